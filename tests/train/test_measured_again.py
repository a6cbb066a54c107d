"""A run is trained when its last checkpoint and its student exist; its measurement and drawing can be repeated."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import yaml
from conftest import bytes_of

import flowmap
from flowmap.base.files import read_json, read_tensors
from flowmap.base.schema import RecipeError, short_hash, to_plain
from flowmap.plan.run_folders import is_complete, matches
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import list_recipes, read_recipe, read_resolved
from flowmap.train.clock import Clock
from flowmap.train.fit import fit
from flowmap.train.module import DistillModule
from flowmap.train.strategy import read_checkpoint

OTHER = {
    "metrics": "metrics=[{kind: frechet, features: pixels, images: 50}]",
    "sampler": "sampler={kind: gamma, gamma: 0.3, steps: [1, 3]}",
    "evaluation": "evaluation.teacher_steps=3",
    "log": "log.grid_images=4",
}


def recipe_of(path, *overrides):
    return flowmap.read_recipe(path, overrides)


def quiet(message):
    pass


@pytest.fixture
def untrained(monkeypatch):
    """Any training step fails."""

    def fail(self, batch, batch_idx):
        raise AssertionError("a training step")

    return lambda: monkeypatch.setattr(DistillModule, "training_step", fail)


def assert_trained(folder, step=20):
    state, shipped = (
        read_checkpoint(folder / "checkpoints/last.ckpt"),
        read_tensors(folder / "student/model.safetensors"),
    )
    assert state["global_step"] == step and flowmap.load_student(folder).config.step == step
    assert all(bool((state["state_dict"][f"averages.0.{name}"] == tensor).all()) for name, tensor in shipped.items())


@pytest.mark.parametrize(
    "error",
    [ValueError("no such module"), RuntimeError("out of memory"), AssertionError(), ZeroDivisionError("by zero")],
)
def test_a_run_whose_measuring_fails_is_trained_and_measured_by_another_recipe(
    tiny, tmp_path, monkeypatch, command, untrained, error
):
    def fail(*args, **kwargs):
        assert_trained(tmp_path / "run")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("flowmap.train.artifacts.measure", fail)
        code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run")
    (said,) = [line for line in err.splitlines() if line.startswith("flowmap: ")]
    assert code == 1 and "trained for 20 steps, but measuring failed: " in said and "`flowmap fit --resume`" in said, (
        err
    )
    assert str(error) in said and (type(error).__name__ in said) == (type(error) not in (ValueError, RuntimeError))
    assert_trained(tmp_path / "run")
    weights = (tmp_path / "run/student/model.safetensors").read_bytes()
    untrained()
    code, out, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume", OTHER["metrics"])
    assert code == 0 and "resuming at step 20" in err and "frechet_pixels" in out, err
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == weights
    assert (
        "images: 50" in (tmp_path / "run/recipe.yaml").read_text()
        and (tmp_path / "run/samples/step-00000020.png").is_file()
    )


def test_samples_that_cannot_be_drawn_stop_neither_training_nor_measuring(
    tiny, tmp_path, monkeypatch, command, untrained
):
    def fail(*args, **kwargs):
        raise TypeError("Cannot handle this data type: (1, 1, 2), |u1")

    settings = ("log.samples_every_steps=5", "trainer.checkpoint_every_steps=20")
    with monkeypatch.context() as patch:
        patch.setattr("flowmap.train.pictures.to_grid", fail)
        code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", *settings)
    assert (
        code == 1 and err.count("warning: drawing samples failed, training goes on: TypeError: Cannot handle") == 1
    ), err
    assert "trained for 20 steps, but drawing its samples failed: TypeError: Cannot handle" in err.splitlines()[-1]
    assert_trained(tmp_path / "run")
    figures = read_json(tmp_path / "run/metrics.json")["student"]
    untrained()
    code, out, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", *settings)
    assert code == 0 and "complete in" in err and not (tmp_path / "run/samples").exists()
    code, out, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume", *settings)
    assert code == 0 and "measured again" in err and (tmp_path / "run/samples/step-00000020.png").is_file(), err
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["student"] == figures and "not_drawn" not in metrics


@pytest.mark.parametrize("what", OTHER)
def test_a_trained_run_is_measured_again_and_nothing_is_trained(tiny, finished, command, untrained, what):
    before, old = bytes_of(finished), read_json(finished / "metrics.json")
    untrained()
    out = command("fit", "--recipe", tiny, "--out", finished, OTHER[what], "--dry-run")[1]
    assert ": complete" in out and ("fit wants --resume, which measures it again" in out) == (what != "log")
    code, out, err = command("fit", "--recipe", tiny, "--out", finished, OTHER[what])
    assert bytes_of(finished) == before
    if what == "log":  # says nothing of the run
        assert code == 0 and "complete in" in err
    else:
        assert (
            code == 2 and f"measured otherwise (first difference: {what}" in err and "--resume measures it again" in err
        ), err
    code, out, err = command("fit", "--recipe", tiny, "--out", finished, OTHER[what], "--resume")
    assert code == 0 and "measured again" in err, err
    after, new = bytes_of(finished), read_json(finished / "metrics.json")
    kept = {"student/model.safetensors", "checkpoints/last.ckpt", *(name for name in before if name.startswith("ema/"))}
    assert set(after) == set(before) and all(after[name] == before[name] for name in kept)
    assert new["seconds"]["train"] == old["seconds"]["train"]
    assert (new["student"] == old["student"]) == (what in ("log", "evaluation"))
    assert (after["samples/step-00000020.png"] == before["samples/step-00000020.png"]) == (what == "metrics")
    sampler = flowmap.load_student(finished).config.sampler
    assert tuple(sampler.steps) == ((1, 3) if what == "sampler" else (1, 2)) and getattr(sampler, "gamma", 0.0) == (
        0.3 if what == "sampler" else 0
    )
    assert is_complete(finished, recipe_of(tiny, OTHER[what])) and is_complete(finished, recipe_of(tiny))
    assert command("fit", "--recipe", tiny, "--out", finished, OTHER[what], "--resume")[2].count("complete in") == 1
    assert bytes_of(finished) == after


@pytest.mark.parametrize("where", ["flowmap.train.artifacts.measure", "flowmap.train.finish.full_state"])
def test_a_run_keeps_its_figures_until_it_is_measured_again(tiny, finished, monkeypatch, where):
    def fail(*args, **kwargs):
        raise RuntimeError("as arranged")

    before = {name: data for name, data in bytes_of(finished).items() if name != "samples/step-00000020.png"}
    monkeypatch.setattr(where, fail)
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(recipe_of(tiny, OTHER["sampler"]), finished, resume=True, log=quiet)
    after = bytes_of(finished)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("moment", ["stamp", "write_json"])
def test_figures_are_never_those_of_another_recipe(tiny, finished, monkeypatch, moment):
    """Killed between writing the recipe and its figures: the run is then trained, and not measured."""

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"flowmap.train.finish.{moment}", die)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe_of(tiny, OTHER["sampler"]), finished, resume=True, log=quiet)
    assert not is_complete(finished, recipe_of(tiny))
    said = []
    run = fit(recipe_of(tiny, OTHER["sampler"]), finished, resume=True, log=said.append)
    assert "resuming at step 20" in said and set(run.metrics["student"]) == {"1", "3"}


def test_an_unfinished_run_goes_on_with_other_metrics(tiny, finished, tmp_path, monkeypatch):
    original = DistillModule.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == 9:
            raise RuntimeError("as arranged")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DistillModule, "training_step", stop)
        with pytest.raises(RuntimeError, match="as arranged"):
            fit(recipe_of(tiny), tmp_path / "run", log=quiet)
    said = []
    run = fit(recipe_of(tiny, OTHER["metrics"], OTHER["sampler"]), tmp_path / "run", resume=True, log=said.append)
    assert "resuming at step 6" in said and set(run.metrics["student"]) == {"1", "3"}
    assert (run.folder / "student/model.safetensors").read_bytes() == (
        finished / "student/model.safetensors"
    ).read_bytes()


def test_what_cannot_be_measured_again_is_left_alone(tiny, finished, tmp_path, command):
    (finished / "checkpoints/last.ckpt").unlink()
    before = bytes_of(finished)
    code, _, err = command("fit", "--recipe", tiny, "--out", finished, OTHER["metrics"], "--resume")
    assert code == 2 and "last.ckpt is not there" in err and f"`flowmap evaluate --student {finished}`" in err
    assert command("fit", "--recipe", tiny, "--out", finished, OTHER["log"], "--resume")[0] == 0
    assert bytes_of(finished) == before
    ticks = iter(range(1000))
    run = fit(recipe_of(tiny), tmp_path / "cut", log=quiet, clock=Clock(9, lambda: next(ticks)))
    before = bytes_of(run.folder)
    assert 6 < run.metrics["training"]["steps"] < 12
    with pytest.raises(RecipeError, match=r"last.ckpt is of step 6, and the student of step \d"):
        fit(recipe_of(tiny, OTHER["metrics"]), run.folder, resume=True, log=quiet)
    assert bytes_of(run.folder) == before


@pytest.mark.parametrize("name", list_recipes())
def test_only_what_is_trained_makes_another_run(name):
    recipe = read_recipe(name)
    other = replace(
        recipe, metrics=(), evaluation=replace(recipe.evaluation, seed=7), log=replace(recipe.log, wandb=False)
    )
    assert other.training_hash() == recipe.training_hash()
    assert replace(other, sampler=replace(recipe.sampler, steps=(5,))).training_hash() == recipe.training_hash()
    assert replace(other, seed=recipe.seed + 1).training_hash() != recipe.training_hash()
    draws = any(
        kind in recipe.to_yaml() for kind in ("kind: adversarial\n", "kind: score_distillation\n", "kind: joint\n")
    )
    assert (
        replace(other, sampler=replace(recipe.sampler, t_max=0.99)).training_hash() != recipe.training_hash()
    ) == draws


@pytest.fixture
def taught(tiny, tmp_path):
    """A teacher trained by a recipe, and a student of it, with the recipes' files."""
    flow = re.sub(r"teacher: .*\n|objective: .*\n", "", tiny.read_text()).replace("name: tiny", "name: flow")
    (tmp_path / "flow.yaml").write_text(flow + "objective: {kind: flow_matching}\n")
    text = (
        tiny.read_text()
        .replace("{card: exact}", f"{{recipe: {tmp_path / 'flow.yaml'}}}")
        .replace("name: tiny", "name: taught")
    )
    (tmp_path / "taught.yaml").write_text(text)
    fit(recipe_of(tmp_path / "taught.yaml"), tmp_path / "run", log=quiet)
    return tmp_path


def test_a_student_does_not_depend_on_how_its_teacher_is_measured(taught, untrained):
    untrained()
    before = bytes_of(taught)
    flow = taught / "flow.yaml"
    text = re.sub(r"sampler: .*\n|metrics: .*\n", "", flow.read_text())
    flow.write_text(text + "sampler: {kind: anchored, steps: [7]}\nmetrics: []\n")
    said = []
    fit(recipe_of(taught / "taught.yaml"), taught / "run", log=said.append)
    assert [line.split(": ")[1].split(" ")[0] for line in said] == ["complete", "complete"]
    after = bytes_of(taught)
    assert {name for name in after if after[name] != before[name]} == {"flow.yaml"}
    flow.write_text(flow.read_text() + "seed: 1\n")
    with pytest.raises(RecipeError, match="first difference: the runs that it is built on"):
        fit(recipe_of(taught / "taught.yaml"), taught / "run", log=quiet)


def test_a_run_of_0_1_is_still_known(taught):
    """0.1 named what a run is built on by a hash of all settings that a recipe then had, log apart."""
    (teacher,) = (taught / "runs").glob("flow-*")
    plain = to_plain(read_resolved(teacher / "recipe.yaml"), TABLES, hashed=True)  # without what later versions added
    for setting in ("", "teacher_extra_steps"):  # one that a later version might have added
        plain["evaluation"].pop(setting, None)
        (teacher / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        old = short_hash({key: value for key, value in plain.items() if key != "log"})
        assert (old == recipe_of(taught / "flow.yaml").hash()) == (setting == "")
        (taught / "run/built_on.json").write_text(json.dumps({"recipes": [f"flow-{old}"]}))
        teacher = teacher.rename(taught / f"runs/flow-{old}")
        assert matches(taught / "run", recipe_of(taught / "taught.yaml"))
    (taught / "run/built_on.json").write_text(json.dumps({"recipes": ["flow-01234567"]}))
    assert not matches(taught / "run", recipe_of(taught / "taught.yaml"))


def test_an_unfinished_run_of_another_hash_is_gone_on_with(taught, monkeypatch):
    (teacher,) = (taught / "runs").glob("flow-*")
    (teacher / "metrics.json").unlink()
    teacher.rename(taught / "runs/flow-01234567")
    said = []
    fit(recipe_of(taught / "taught.yaml"), taught / "run", log=said.append)
    assert "resuming at step 20" in said and sorted(path.name for path in (taught / "runs").iterdir()) == [
        "flow-01234567"
    ]


@pytest.mark.parametrize(
    "setting", ["sampler.steps=[1000000000]", "sampler={kind: gamma, gamma: 0.3, steps: [1, 100001]}"]
)
def test_steps_without_end_are_refused_before_training(tiny, tmp_path, command, untrained, setting):
    untrained()
    code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", setting)
    assert code == 2 and "sampler.steps" in err and "100000" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
