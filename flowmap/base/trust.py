"""The modules that recipes may name: only those that the user allows by `--import` or `allow_import`.

Recipes, cards and student folders may be untrusted, so a name such as `os:fork` in one of them never imports a module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_ALLOWED: dict[str, ModuleType] = {}


def allow_import(name: str) -> ModuleType:
    """Import a module by name or from a .py file; recipes may then name its attributes as `module:attribute`.

    A file's module is named by the file's stem: `nets.py` allows `nets:attribute`. Submodules are not included.
    Raises a ValueError if the import fails.
    """
    path = Path(name)
    try:
        if path.suffix != ".py":
            _ALLOWED[name] = importlib.import_module(name)
            return _ALLOWED[name]
        spec = importlib.util.spec_from_file_location(f"flowmap_import_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # the file ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module by name
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--import: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    _ALLOWED[path.stem] = module
    return module


def allowed_attribute(name: str, key: str) -> Any:
    """The attribute `module:attribute` of an allowed module; nothing is imported. ValueErrors start with `key`."""
    module, _, attribute = name.partition(":")
    if module not in _ALLOWED:
        how = f"--import {module} on the command line or flowmap.allow_import({module!r}) in Python allows it"
        raise ValueError(
            f"{key}: {name!r} names code, and a recipe imports nothing on its own; if you trust this module, {how}"
        )
    try:
        return getattr(_ALLOWED[module], attribute)
    except AttributeError:
        what = f"module {module!r} has no attribute {attribute!r}"
        raise ValueError(f"{key}: {name!r} cannot be imported: {what}") from None


def is_allowed(name: str) -> bool:
    """Whether the module of that name has been allowed."""
    return name in _ALLOWED
