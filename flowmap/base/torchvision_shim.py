"""Makes `import torchvision` work where it is broken: lightning, torchmetrics and lpips import it and would fall with it.

Cause: beside a CPU build of torch, the registry's (CUDA) build of torchvision cannot load its C library, so the operators that its
Python code describes do not exist ("operator torchvision::nms does not exist").  Declaring the two operators by their schema is enough
for everything that does not call them.  Can go when torchvision publishes one wheel for all builds of torch.

`main()` (the last step of `make setup`) does the same for whatever runs in this environment without flowmap, `python -c "import diffusers"`
for example: where torchvision is broken it copies this file, and a .pth file that runs it, into site-packages; elsewhere it does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_BROKEN = (RuntimeError, ImportError, OSError)
_kept_alive: list = []  # the operators' registrations live as long as their library handle


def install() -> None:
    """From now on the first `import torchvision`, whoever asks for it, is tried as it is and mended if it fails. Costs nothing before."""
    if not any(type(finder).__name__ == _TorchvisionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
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
                _kept_alive.append(
                    torch.library.Library("torchvision", "DEF")
                )  # refused where its own C library was loaded
                for name in ("nms", "qnms"):
                    _kept_alive[0].define(name + _SCHEMA)
            self.loader.exec_module(module)
        except _BROKEN as error:  # broken in a way that is not known: let importers see it as absent
            raise ImportError(f"torchvision is installed but broken: {error}") from error


COPY = "_flowmap_torchvision"  # the name of this file in site-packages
UNMENDED = (
    "import sys; "
    f"sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != {_TorchvisionFinder.__name__!r}]; "
    "import torchvision"
)


def install_at_start(site_packages: Path) -> bool:
    """Whether `import torchvision` fails here as it is: then every Python of this environment mends it, by two files in site-packages."""
    absent = importlib.util.find_spec("torchvision") is None
    if absent or subprocess.run([sys.executable, "-c", UNMENDED], stderr=subprocess.DEVNULL).returncode == 0:
        return False
    shutil.copy(__file__, site_packages / f"{COPY}.py")
    (site_packages / f"{COPY}.pth").write_text(
        f"import {COPY}; {COPY}.install()\n"
    )  # lines that begin with import are run at the start
    return True


def main() -> None:
    if install_at_start(Path(sysconfig.get_paths()["purelib"])):
        print("torchvision does not fit this build of torch: it is mended whenever a Python of this environment starts")
