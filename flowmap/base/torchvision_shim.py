"""Makes `import torchvision` work if its C library cannot be loaded; lightning, torchmetrics and lpips import it.

Cause: with a CPU build of torch, the registry's (CUDA) build of torchvision cannot load its C library, so the
operators that its Python code describes do not exist ("operator torchvision::nms does not exist"). Declaring the
schemas of the two operators is enough for code that does not call them. Remove this when torchvision publishes one
wheel for all builds of torch.

`main()` (the last step of `make setup`) fixes the whole environment, for programs that do not import flowmap, such
as `python -c "import diffusers"`: if torchvision is broken, it copies this file, and a .pth file that runs it, to
site-packages.
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
_kept_alive: list = []  # an operator stays registered as long as its library handle exists


def install() -> None:
    """Install an import hook that repairs the first `import torchvision` if it fails. It costs nothing until then."""
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
                # raises if torchvision's own C library was loaded
                _kept_alive.append(torch.library.Library("torchvision", "DEF"))
                for name in ("nms", "qnms"):
                    _kept_alive[0].define(name + _SCHEMA)
            self.loader.exec_module(module)
        except _BROKEN as error:  # broken in some other way: importers treat an ImportError as absent
            raise ImportError(f"torchvision is installed but broken: {error}") from error


COPY = "_flowmap_torchvision"  # the name of this file in site-packages
UNMENDED = (
    "import sys; "
    f"sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != {_TorchvisionFinder.__name__!r}]; "
    "import torchvision"
)


def install_at_start(site_packages: Path) -> bool:
    """Whether torchvision is broken; if so, add two files to site-packages that repair it in every Python process."""
    absent = importlib.util.find_spec("torchvision") is None
    if absent or subprocess.run([sys.executable, "-c", UNMENDED], stderr=subprocess.DEVNULL).returncode == 0:
        return False
    shutil.copy(__file__, site_packages / f"{COPY}.py")
    # Python executes lines of .pth files that begin with "import" at startup
    (site_packages / f"{COPY}.pth").write_text(f"import {COPY}; {COPY}.install()\n")
    return True


def main() -> None:
    if install_at_start(Path(sysconfig.get_paths()["purelib"])):
        print("torchvision does not fit this build of torch: it is mended whenever a Python of this environment starts")
