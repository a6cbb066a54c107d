"""Makes `import torchvision` work where it is broken: lightning, torchmetrics and lpips import it and would fall with it.

Cause: beside a CPU build of torch, the registry's (CUDA) build of torchvision cannot load its C library, so the operators that its
Python code describes do not exist ("operator torchvision::nms does not exist").  Declaring the two operators by their schema is enough
for everything that does not call them.  Can go when torchvision publishes one wheel for all builds of torch.

`main()` (the last step of `make setup`) does the same for whatever runs in this environment without flowmap,
`python -c "import diffusers"` for example: where torchvision is broken it writes a .pth file into site-packages, elsewhere it does nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import sysconfig
from pathlib import Path

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_BROKEN = (RuntimeError, ImportError, OSError)
_kept_alive: list = []  # the operators' registrations live as long as their library handle


def install() -> None:
    """From now on the first `import torchvision`, whoever asks for it, is tried as it is and mended if it fails. Costs nothing before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    _looking = False

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _MendingLoader(spec.loader)
        return spec


class _MendingLoader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        try:
            self.loader.exec_module(module)
        except _BROKEN:
            self._mend_and_retry(module)

    def _mend_and_retry(self, module):
        import torch

        for name in [n for n in sys.modules if n.startswith("torchvision.")]:
            del sys.modules[name]
        try:
            if not _kept_alive:
                _kept_alive.append(torch.library.Library("torchvision", "DEF"))  # refused where its own C library was loaded
                for name in ("nms", "qnms"):
                    _kept_alive[0].define(name + _SCHEMA)
            self.loader.exec_module(module)
        except _BROKEN as error:  # broken in a way that is not known: let importers see it as absent
            raise ImportError(f"torchvision is installed but broken: {error}") from error


START = 'import importlib.util; importlib.util.find_spec("flowmap") and __import__("flowmap")\n'  # a .pth file runs lines that begin with import


def install_at_start(site_packages: Path) -> bool:
    """Whether `import torchvision` needed mending: then every Python of this environment mends it, by a .pth file in site-packages."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    if not _kept_alive:
        return False
    (site_packages / "flowmap_torchvision.pth").write_text(START)
    return True


def main() -> None:
    if install_at_start(Path(sysconfig.get_paths()["purelib"])):
        print("torchvision does not fit this build of torch: it is mended when Python starts, by flowmap_torchvision.pth")
