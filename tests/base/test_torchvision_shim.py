"""flowmap works where torchvision is absent, sound, broken in the known way, or broken in another.

Each case runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import TINY

from flowmap.base.torchvision_shim import UNMENDED

KNOWN = """\
import torch
def _meta(name):
    torch.library.register_fake(name)(lambda dets, scores, iou_threshold: dets)
_meta("torchvision::nms")
__version__ = "0.99.0"
from . import transforms
"""
SOUND = "__version__ = '0.99.0'\nfrom . import transforms\n"
OTHER = "raise RuntimeError('broken in a way that nobody knows')\n"
INNER = "import torch\nfrom . import missing_part\n"
BLOCK = """\
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torchvision" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
import importlib.metadata
def without(name, of=importlib.metadata.distribution):
    if name == "torchvision":
        raise importlib.metadata.PackageNotFoundError(name)
    return of(name)
importlib.metadata.distribution = without
"""
MEND = """\
import torch
try:
    import torchvision
except RuntimeError:
    import sys
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
LOOK = """\
import flowmap.nets
try:
    import torchvision
    import torch
    print("version", torchvision.__version__, hasattr(torch.ops.torchvision, "nms"))
except ImportError as error:
    print("absent", type(error).__name__)
"""


def run(text, folder, *paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def stub(folder, text):
    (folder / "stub" / "torchvision").mkdir(parents=True)
    (folder / "stub" / "torchvision" / "__init__.py").write_text(text)
    (folder / "stub" / "torchvision" / "transforms.py").write_text("")
    return folder / "stub"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(SOUND, "version 0.99.0 False", id="sound", marks=pytest.mark.slow),
        pytest.param(KNOWN, "version 0.99.0 True", id="known"),
        pytest.param(OTHER, "absent ImportError", id="other", marks=pytest.mark.slow),
        pytest.param(INNER, "absent ImportError", id="inner"),
    ],
)
def test_a_torchvision_of_each_kind(tmp_path, text, says):
    assert run(LOOK, tmp_path, stub(tmp_path, text)).strip() == says


def test_an_absent_torchvision_and_that_importing_flowmap_alone_changes_no_import(tmp_path):
    text = "import sys; before = list(sys.meta_path); import flowmap; assert sys.meta_path == before\n"
    text += "import flowmap.flow.path; assert sys.meta_path == before\n"
    assert run(BLOCK + text + LOOK, tmp_path).strip() == "absent ModuleNotFoundError"


def test_the_stub_is_broken_as_the_real_one_is(tmp_path):
    """Also in the environment of `make setup`, whose every Python mends torchvision."""
    done = subprocess.run(
        [sys.executable, "-c", UNMENDED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(stub(tmp_path, KNOWN))},
    )
    assert "operator torchvision::nms does not exist" in done.stderr


def test_a_torchvision_that_cannot_be_mended_is_refused_again_and_again(tmp_path):
    text = "import flowmap.nets\nfor _ in range(3):\n    try:\n        import torchvision\n"
    text += "    except ImportError as error:\n        print(error)\n"
    said = run(text, tmp_path, stub(tmp_path, OTHER)).splitlines()
    assert said == ["torchvision is installed but broken: broken in a way that nobody knows"] * 3


@pytest.mark.parametrize(
    ("text", "says"),
    [pytest.param(KNOWN, "True True", marks=pytest.mark.slow), (SOUND, "False False")],
    ids=["known", "sound"],
)
def test_where_it_is_broken_every_python_of_the_environment_mends_it(tmp_path, text, says):
    """As `make setup` does; the line that it writes mends torchvision where flowmap has not been imported."""
    write = f"from pathlib import Path; import flowmap.base.torchvision_shim; at = Path({str(tmp_path)!r})\n"
    write += "print(flowmap.base.torchvision_shim.install_at_start(at), (at / '_flowmap_torchvision.pth').exists())"
    assert run(write, tmp_path, stub(tmp_path, text)).strip() == says
    if text is KNOWN:
        start = f"import site; site.addsitedir({str(tmp_path)!r}); import torchvision; print(torchvision.__version__)"
        assert run(start, tmp_path, tmp_path / "stub").strip() == "0.99.0"


COMMANDS = """\
from flowmap.cli import main
for line in (
    "fit --recipe tiny.yaml --out run",
    "sample --student run --num 2 --out drawn",
    "evaluate --student run",
    "list",
):
    assert main(line.split()) == 0, line
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [BLOCK, MEND, ""], ids=["absent", "sound", "as it is here"])
def test_the_commands_work_with_each(tmp_path, before):
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert "student 1" in run(before + COMMANDS, tmp_path)
