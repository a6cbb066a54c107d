"""The exit code of a dry run: 0 if `fit` can start, 2 for a mistake in the recipe.

3 is for something named that is not on this machine.
"""

import pytest
import torch
from conftest import FLOW
from safetensors.torch import save_file

from flowmap.recipe import read_recipe
from flowmap.recipe.settings import Trainer

STUDENT = """\
name: student
data: {kind: toy, points: 200, batch_size: 16}
teacher: {recipe: TEACHER}
student: {kind: mlp, width: 16, depth: 1}
objective: {kind: ayf_emd, warmup_steps: 2}
trainer: {steps: 2, accelerator: cpu}
log: {wandb: false, grid_images: 4}
"""
PICTURES = "{kind: folder, root: gone, size: 16}"
LARGER = "data={kind: folder, root: gone, size: 32}"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A student's recipe beside that of its teacher, both in a folder of their own, where runs go as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "teacher.yaml").write_text(FLOW.replace("name: flow", "name: teacher"))
    (tmp_path / "student.yaml").write_text(STUDENT.replace("TEACHER", str(tmp_path / "teacher.yaml")))
    return tmp_path / "student.yaml"


def overrides_of_teacher(*settings):
    return "teacher.overrides=[" + ", ".join(f"'{one}'" for one in settings) + "]"


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ([], 0, "nothing is missing on this machine"),
        (["data.num_modes=12"], 2, "student: data: has 12 classes, the teacher teacher 8"),
        (["data.num_modes=12", "data.conditional=false"], 0, "nothing is missing"),
        (["data=" + PICTURES], 2, "student: data: its samples are (3, 16, 16), those of the teacher teacher (2,)"),
        (
            [LARGER, overrides_of_teacher("data=" + PICTURES)],
            2,
            "(3, 32, 32), those of the teacher teacher (3, 16, 16)",
        ),
        (["data=" + PICTURES, overrides_of_teacher("data=" + PICTURES)], 3, "data.root: gone"),
        (["data={kind: latents, root: gone, num_classes: 8}"], 3, "data.root: gone: has no *.safetensors shards"),
        (["data.points=9"], 2, "data.points: 9 must be 10 or more"),
        (["metrics=[{kind: frechet, features: clip}]"], 2, "metrics: features 'clip' look at pictures"),
        (["metrics=[{kind: agreement}]", "data.conditional=false"], 2, "metrics: agreement needs data with classes"),
        (
            ["teacher=null", "objective={kind: cmt}"],
            2,
            "student: objective.kind: cmt follows the teacher's own trajectories",
        ),
        (["student={kind: dit}"], 2, "student: student: patch: 2 does not divide a sample of shape (2,)"),
        (["trainer.accelerator=tpus"], 2, "trainer.accelerator: 'tpus' is not one of auto, cpu"),
    ],
)
def test_the_exit_code_says_whether_fit_can_start(settings, code, says, recipe, command):
    got, out, err = command("fit", "--dry-run", "--recipe", recipe, *settings)
    assert (got, says in (err if code == 2 else out)) == (code, True), (got, out, err)
    assert err.count("\n") == (code == 2) and not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.num_modes=12"], "has 12 classes, the teacher teacher 8"),
        (["data=" + PICTURES, overrides_of_teacher("data=" + PICTURES)], "data.root: gone"),
        (["teacher=null", "objective={kind: cmt}"], "objective.kind: cmt follows"),
    ],
)
def test_fit_refuses_the_same_before_its_first_stage(settings, says, recipe, command):
    code, _, err = command("fit", "--recipe", recipe, *settings)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (recipe.parent / "runs" / "student").exists() and not list((recipe.parent / "runs").glob("teacher*"))


def test_pictures_that_the_autoencoder_does_not_divide_are_named(command):
    code, _, err = command("fit", "--dry-run", "--recipe", "emoji32", "data.images.size=30")
    assert (
        code == 2
        and "data.images.size: 30 is not a multiple of 4, the side of one latent of 'emoji32-autoencoder'" in err
    )


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="it has one")
def test_a_device_that_is_not_here_is_missing(recipe, command):
    code, out, _ = command("fit", "--dry-run", "--recipe", recipe, "trainer.accelerator=gpu")
    assert code == 3 and "missing on this machine: trainer.accelerator: 'gpu': this machine has none" in out


def test_more_devices_than_there_are_are_missing(monkeypatch):
    from flowmap.estimate.dry_run import missing_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = lambda **settings: missing_devices(
        read_recipe("toy/mixture", [f"trainer.{key}={value}" for key, value in settings.items()])
    )
    assert devices(devices=3) == devices(devices=3, accelerator="gpu") == ["trainer.devices: 3: this machine has 2"]
    assert devices(devices=2) == devices(devices=3, accelerator="cpu") == [] and Trainer().devices == 1


def test_latents_of_another_teachers_shape_are_seen_where_they_are(recipe, tmp_path, command):
    (tmp_path / "latents").mkdir()
    save_file(
        {"x0": torch.zeros(20, 4, 8, 8), "class": torch.arange(20) % 8}, str(tmp_path / "latents" / "0.safetensors")
    )
    code, _, err = command(
        "fit", "--dry-run", "--recipe", recipe, "data={kind: latents, root: latents, num_classes: 8}"
    )
    assert code == 2 and "its samples are (4, 8, 8), those of the teacher teacher (2,)" in err
