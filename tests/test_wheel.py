"""The built wheel, installed where the repository is not, lists, shows and trains the shipped recipes."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sh(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLOWMAP_RUNS")} | {
        "WANDB_MODE": "disabled"
    }
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(bin folder, an empty folder to work in) of an environment that has the wheel.

    It has the packages of this environment, but not this repository.
    """
    folder = tmp_path_factory.mktemp("wheel")
    sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
    wheel = next((folder / "dist").glob("*.whl"))
    sh(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    # Python searches a folder named in a .pth file, but does not read that folder's own .pth files (one of them is the
    # editable install of this repository)
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    sh(
        folder / "env" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        wheel,
        cwd=folder,
    )
    (folder / "work").mkdir()
    return wheel, folder / "env" / "bin", folder / "work"


@pytest.mark.slow
def test_recipes_and_teachers_are_in_the_wheel(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    for folder in ("recipes", "teachers"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"flowmap/shipped/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith(("tests/", "runs/", "benchmarks/"))]


@pytest.mark.slow
def test_the_installed_commands_work_away_from_the_repository(installed):
    _, binary, work = installed
    where = sh(binary / "python", "-c", "import flowmap; print(flowmap.__file__)", cwd=work)
    assert str(ROOT) not in where
    assert "toy/mixture" in sh(binary / "flowmap", "list", cwd=work)
    assert "kind: ayf_mixed" in sh(binary / "flowmap", "show", "--recipe", "digits.yaml", cwd=work)
    assert "name: rfpp-a" in sh(
        binary / "flowmap", "show", "--recipe", "rfpp/a", "+method/scm", cwd=work
    )  # a row of a table, and another
    small = [
        "trainer.steps=5",
        "data.points=500",
        "metrics=[{kind: frechet, features: pixels, images: 100}]",
        "evaluation.teacher_steps=4",
    ]
    out = sh(binary / "flowmap", "fit", "--recipe", "toy/mixture", *small, cwd=work)
    assert "student 1" in out and (work / "runs" / "toy-mixture" / "student" / "model.safetensors").is_file()
    sh(binary / "flowmap", "sample", "--student", "runs/toy-mixture", "--num", 4, "--out", "drawn", cwd=work)
    assert (work / "drawn" / "steps-4.png").is_file()
