"""Networks that are built without memory for their weights, to be filled from a file or with another's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


@contextmanager
def without_weights() -> Iterator[None]:
    """A context in which parameters of modules are made on the meta device, and buffers as usual.

    Unlike with torch.device("meta"), constants that no file of weights has are there. Fill the parameters by
    load_state_dict(assign=True).
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(
            module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        )

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def weights_dropped(kept: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """A context in which each module draws its weights as always, and drops them when it becomes part of another one.

    So the generator is left as if all were there, and no more than a layer's weights are in memory at once; they are on
    the meta device afterwards. kept: modules that keep theirs, and those directly in them.
    """

    def drop(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None or isinstance(parent, kept) or isinstance(module, kept):
            return
        for key, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(p.detach().to("meta"), p.requires_grad))

    handle = register_module_module_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()
