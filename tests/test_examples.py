"""The scripts of examples/ run, with tiny settings, and show what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flowmap
from flowmap.nets import module_builders

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLISHED = Path(__file__).parents[2] / "shared" / "published"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example with arguments in an empty folder, and returns the names that it defines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))

    def run(name: str, *arguments: object) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "folder_to_student.py",
        "own_lightning.py",
        "own_module.py",
        "own_teacher.py",
    }


def test_own_modules_in_plain_torch(run):
    """Two steps of the student are ten times closer to the teacher's 64 than two steps of the teacher."""
    names = run("own_module.py", 200)
    noise, one, teacher = names["noise"], names["one"], names["teacher"]
    x = noise - teacher.velocity(noise, one) / 2
    x = x - teacher.velocity(x, one / 2) / 2
    two_steps = float((x - names["x_teacher"]).square().sum(dim=1).mean().sqrt())
    assert names["distance"] < 0.1 * two_steps


@pytest.mark.parametrize("name", ["own_module.py", "own_teacher.py"])
def test_the_examples_of_own_modules_are_short(name):
    code = (EXAMPLES / name).read_text().split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) < 40


@pytest.mark.slow
def test_published_teachers_and_their_pictures(run, tmp_path, monkeypatch):
    """A few steps of the way from published weights to students, loaded again with the files of their networks."""
    if not (PUBLISHED / "mnist-flow-vit").is_dir():
        pytest.skip(f"{PUBLISHED} has no published models")
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as of a script
    few = ["trainer.steps=2", "data.batch_size=4", "metrics=[]", "evaluation.teacher_steps=2", "log.grid_images=4"]
    run("own_teacher.py", PUBLISHED, *few)
    for table in ("BUILDERS", "_GIVEN", "_WEIGHTS"):  # as in another process
        monkeypatch.setattr(module_builders, table, {})
    for name, classes in (("mnist-flow-vit", 10), ("mnist-ddpm", None)):
        network = str(EXAMPLES / "published" / f"{name.replace('-', '_')}.py")
        student = flowmap.load_student(tmp_path / "runs" / f"own-{name}", imports=network)
        assert student.config.net.module == name and student.config.num_classes == classes
        assert student.sample(2, steps=2).shape == (2, 1, 28, 28)


def test_an_objective_in_a_lightning_module(run, tmp_path):
    run("own_lightning.py", "--steps", 2, "--out", tmp_path / "digits.png")
    assert Image.open(tmp_path / "digits.png").size == (500, 200)


def test_a_folder_of_pictures_to_a_student(run, tmp_path):
    draws = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            pixels = draws.integers(0, 255, (12, 10, 3)).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    tiny = "--size 8 --preset nano --batch-size 8 --teacher-steps 8 --student-steps 6 --teacher-calls 2 --images 6"
    run("folder_to_student.py", tmp_path / "pictures", "--out", tmp_path / "mine", *tiny.split())
    assert (tmp_path / "mine/pictures/steps-2.png").is_file()
    student = flowmap.load_student(tmp_path / "mine/run")
    assert student.config.shape == (3, 8, 8) and student.config.num_classes == 2
