"""The modules that a recipe may take code from: those that the user allows by `--import` or `allow_import`, and no others.

A recipe, a card or a student's folder may come from anyone, so a name such as `os:fork` in one of them never imports a module.
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
    """Imports the module of that name, or runs that .py file; from then on a recipe may name its attributes as `module:attribute`.

    The module of a file is called by the file's stem: `nets.py` allows `nets:attribute`. Submodules are not included. Raises ValueError
    where it cannot be imported.
    """
    path = Path(name)
    try:
        if path.suffix != ".py":
            _ALLOWED[name] = importlib.import_module(name)
            return _ALLOWED[name]
        spec = importlib.util.spec_from_file_location(f"flowmap_import_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # of a file that ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--import: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    _ALLOWED[path.stem] = module
    return module


def allowed_attribute(name: str, key: str) -> Any:
    """What `module:attribute` names, where the user allowed that module; nothing is imported. ValueError starts with `key`."""
    module, _, attribute = name.partition(":")
    if module not in _ALLOWED:
        how = f"--import {module} on the command line or flowmap.allow_import({module!r}) in Python allows it"
        raise ValueError(
            f"{key}: {name!r} names code, and a recipe imports nothing on its own; if you trust this module, {how}"
        )
    if not attribute or not hasattr(_ALLOWED[module], attribute):
        raise ValueError(f"{key}: {name!r} cannot be imported: module {module!r} has no attribute {attribute!r}")
    return getattr(_ALLOWED[module], attribute)
