"""Where modules of one's own come from: BUILDERS, by name, and modules that Python was given in this process.

A recipe and a student's folder only name a builder. Its code comes from `--import`, `allow_import`, an installed
package's entry points, or the running script; a file never imports any.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowmap.base.trust import allowed_attribute, is_allowed

Made = TypeVar("Made", bound=Callable[..., nn.Module])
BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_GIVEN: dict[str, nn.Module] = {}
_WEIGHTS: dict[str, dict[str, Tensor]] = {}


def module(name: str) -> Callable[[Made], Made]:
    """A decorator: recipes and student folders may name this class or function, which returns a module, by `name`.

    @flowmap.module("flow-vit")
    class FlowViT(nn.Module): ...
    """

    def registered(builder: Made) -> Made:
        BUILDERS[name] = builder
        return builder

    return registered


def built(name: str, arguments: str) -> nn.Module:
    """The module that the builder of that name makes. ValueErrors start with the setting's name."""
    if name in _GIVEN:
        return copy.deepcopy(_GIVEN[name]).to(torch.empty(0).device)  # of the context, which may be meta
    builder = _builder_of(name)
    try:
        made = builder(**json.loads(arguments))
    except Exception as error:  # of the user's own code
        what = f"{name!r} makes no module: {type(error).__name__}: {error}"
        raise ValueError(f"module: {what}; arguments: {arguments}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"module: {name!r} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def _builder_of(name: str) -> Callable[..., nn.Module]:
    if name in BUILDERS:
        return BUILDERS[name]
    home, colon, _ = name.partition(":")
    if colon and is_allowed(home):
        found = allowed_attribute(name, "module")
        if isinstance(found, type) and issubclass(found, nn.Module):  # an imported function could do anything
            return found
        raise ValueError(f"module: {name!r} is no class of torch.nn.Module; register a function by @flowmap.module")
    known = f"registered: {', '.join(BUILDERS)}" if BUILDERS else "none is registered"
    where = f"{home.replace('.', '/')}.py" if colon else "FILE.py"
    how = f"--import {where} on the command line, or imports={where!r} of load_student"
    raise ValueError(f"module: no builder {name!r} ({known}); its code comes from you alone: {how}")


def name_of(made: Any) -> str:
    """`module:Class` of a module or `module:function`, by which it can be imported; a script's module is its stem."""
    cls = made if hasattr(made, "__qualname__") else type(made)
    home = cls.__module__
    if home == "__main__":
        home = Path(str(vars(sys.modules["__main__"]).get("__file__") or "notebook.py")).stem
    return f"{home.removeprefix('flowmap_import_')}:{cls.__qualname__.rpartition('.')[2]}"


def give(name: str, made: nn.Module, digest: str | None) -> None:
    """Let settings of this process name that module, and its weights by their fingerprint."""
    other = _GIVEN.get(name)
    if other is not None and _structure(other) != _structure(made):
        raise ValueError(f"module: two modules of other sizes are named {name!r}; wrap one with another name=")
    _GIVEN[name] = made
    if digest is not None:
        _WEIGHTS[digest] = {key: tensor.detach().clone() for key, tensor in made.state_dict().items()}


def given_weights(digest: str) -> dict[str, Tensor] | None:
    """The weights with that fingerprint, if they were given in this process."""
    return _WEIGHTS.get(digest)


def _structure(made: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in made.state_dict().items()]
