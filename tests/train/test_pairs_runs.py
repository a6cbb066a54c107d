"""Runs on pairs: what makes them is trained first, batches are the pairs' own, and a resumed run is bit-equal."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FLOW

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data, build_samples
from flowmap.data import StepBatches
from flowmap.data.pairs import noise_of
from flowmap.plan.plan import Pairing, Stage, plan, resolve
from flowmap.recipe import read_recipe
from flowmap.train.draw import draw_sample
from flowmap.train.module import DistillModule

pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:coupling.inverted")

STUDENT = """\
name: small-student
data: {kind: toy, points: 200, batch_size: 16, drop_condition: 0.2}
teacher: {card: CARD}
coupling:
  kind: pairs
  teacher: {card: CARD, guidance: {kind: classifier_free, default: 2.0}}
  num: 90
  inverted: 0.3
  shard_items: 20
  solver: {kind: heun, steps: 4}
student: {kind: from_teacher}
times: {kind: u_shaped}
objective: {kind: rectified}
optimizer: {lr: 1.0e-2}
sampler: {kind: anchored, steps: [1, 2]}
trainer: {steps: 9, accelerator: cpu, checkpoint_every_steps: 3}
metrics: [{kind: frechet, features: pixels, images: 50}]
evaluation: {teacher_steps: 2, batch_size: 50}
log: {wandb: false, every_steps: 1, grid_images: 4}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """small(key=value, ...): the student's recipe; its teacher's lies beside it."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "card.yaml").write_text(f"kind: recipe\nrecipe: {tmp_path / 'teacher.yaml'}\nshape: [2]\n")
    (tmp_path / "teacher.yaml").write_text(FLOW.replace("name: flow", "name: small-teacher"))
    (tmp_path / "student.yaml").write_text(STUDENT.replace("CARD", str(tmp_path / "card.yaml")))
    return lambda *overrides: read_recipe(tmp_path / "student.yaml", overrides)


def quiet(message):
    pass


def test_fit_trains_the_teacher_makes_the_pairs_and_uses_them_once(small, tmp_path, command):
    stages = plan(small(), tmp_path / "run")
    assert [type(stage) for stage in stages] == [Stage, Pairing, Stage] and not any(stage.complete for stage in stages)
    code, out, _ = command("fit", "--recipe", tmp_path / "student.yaml", "--dry-run")
    assert code == 0 and "90 pairs ->" in out and "nothing is missing" in out
    said = []
    flowmap.fit(small(), tmp_path / "run", log=said.append)
    assert any("[2/3] small-student: 90 pairs -> " in line for line in said)
    assert sum(line.startswith("teacher: 32 samples at 2 steps") for line in said) == 2, (
        "before the pairs, and before the student"
    )
    student = flowmap.load_student(tmp_path / "run")
    assert student.sample(4, steps=2).shape == (4, 2) and student.config.guidance is None and not student.config.arrival
    assert {"train/error", "by_time/error_t0.00-0.25"} <= set(
        (tmp_path / "run" / "log.csv").read_text().split("\n")[0].split(",")
    )
    said.clear()
    flowmap.fit(small(), tmp_path / "run", log=said.append)
    assert [": complete in" in line for line in said] == [True] * 3
    shutil.rmtree(stages[1].folder)
    flowmap.evaluate(tmp_path / "run")  # a student is measured without the pairs that it learned from


@pytest.fixture
def ready(small, tmp_path):
    """The teacher trained and the pairs made."""
    from flowmap.prepare.make_pairs import make_pairs

    flowmap.fit(read_recipe(tmp_path / "teacher.yaml"), tmp_path / "runs" / "small-teacher", log=quiet)
    make_pairs(resolve(small()))
    return small


def test_a_step_sees_the_pairs_of_its_batch(ready, tmp_path, monkeypatch):
    seen = []
    original = DistillModule.training_step

    def look(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append(self.last_sample)
        return loss

    monkeypatch.setattr(DistillModule, "training_step", look)
    flowmap.fit(ready("trainer.steps=3", "data.drop_condition=0"), tmp_path / "run", log=quiet)
    pairs = build_samples(resolve(ready()), build_data(resolve(ready())))
    for sample, rows in zip(seen, StepBatches(90, 16, seed=0, num_steps=3), strict=True):
        x0, cond, x1 = pairs.__getitems__(rows)
        assert (
            torch.equal(sample.x0, x0)
            and torch.equal(sample.x1, x1)
            and torch.equal(sample.cond["class"], cond["class"])
        )
        fresh = [(row, i) for row, i in enumerate(rows) if i < pairs.num_generated]
        assert fresh and all(torch.equal(sample.x1[row], noise_of(0, i, (2,))) for row, i in fresh)


def test_a_run_cut_off_goes_on_bit_equal(ready, tmp_path, monkeypatch):
    whole = flowmap.fit(ready(), tmp_path / "whole", log=quiet)
    original = DistillModule.training_step

    def cut(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("cut")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut"):
        patch.setattr(DistillModule, "training_step", cut)
        flowmap.fit(ready(), tmp_path / "cut", log=quiet)
    flowmap.fit(ready(), tmp_path / "cut", resume=True, log=quiet)
    one, other = (read_tensors(folder / "student" / "model.safetensors") for folder in (whole.folder, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_objectives_take_pairs_too(ready, tmp_path):
    ayf = ready(
        "objective.kind=ayf_emd",
        "objective.warmup_steps=2",
        "times.kind=interval",
        "sampler.kind=deterministic",
        "trainer.steps=2",
    )
    assert resolve(ayf).pairs.root == resolve(ready()).pairs.root
    flowmap.fit(ayf, tmp_path / "ayf", log=quiet)
    assert flowmap.load_student(tmp_path / "ayf").config.arrival


def test_pairs_of_a_recipe_are_those_of_its_student(ready, tmp_path):
    reflow = ready(
        "coupling.teacher=null",
        f"coupling.recipe={tmp_path / 'teacher.yaml'}",
        "coupling.inverted=0",
        "trainer.steps=2",
    )
    stages = plan(reflow, tmp_path / "run")
    assert (
        [type(stage) for stage in stages] == [Stage, Pairing, Stage] and stages[0].complete and not stages[1].complete
    )
    flowmap.fit(reflow, tmp_path / "run", log=quiet)
    run = resolve(reflow)
    x0, cond, x1 = build_samples(run, build_data(run)).__getitems__(range(8))
    student = flowmap.load_student(tmp_path / "runs" / "small-teacher")
    x = reflow.coupling.solver(lambda x, t: student.flow_map.mean_velocity(x, t, t, cond), x1).x
    torch.testing.assert_close(x0, x.half().float())
    with pytest.raises(RecipeError, match="takes no guidance"):
        build_samples(resolve(replace(reflow, coupling=replace(reflow.coupling, guidance=2.0))), build_data(run))


def test_another_teacher_or_a_new_training_of_it_is_refused(ready, tmp_path):
    folder = resolve(ready()).pairs.root
    run = tmp_path / "runs" / "small-teacher"
    assert Pairing(resolve(ready())).complete
    with pytest.raises(RecipeError, match="holds other pairs: guidance: 2.0 there, 3.0 here"):
        other = ready("coupling.guidance=3.0", f"coupling.root={folder}")
        build_samples(resolve(other), build_data(resolve(other)))
    tensors = read_tensors(run / "student" / "model.safetensors")
    flowmap.base.files.write_tensors(
        run / "student" / "model.safetensors", {name: value + 1e-3 for name, value in tensors.items()}
    )
    assert not Pairing(resolve(ready())).complete
    with pytest.raises(RecipeError, match="teacher.weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"):
        flowmap.fit(ready(), tmp_path / "run", log=quiet)
    shutil.rmtree(run)
    assert Pairing(resolve(ready())).complete  # another machine, without the teacher: its weights are not compared


def test_with_a_pair_the_prior_is_not_asked_and_all_else_is_drawn_the_same_way():
    recipe = read_recipe("digits")
    recipe = replace(recipe, data=replace(recipe.data, drop_condition=0.4), prior=None)
    x0, x1, cond = torch.zeros(64, 1, 8, 8), torch.ones(64, 1, 8, 8), {"class": torch.arange(64)}
    one, other = (draw_sample(recipe, x0, cond, torch.Generator().manual_seed(0), None, x1) for _ in range(2))
    assert torch.equal(one.x1, x1) and torch.equal(one.t, other.t) and 10 < int((one.cond["class"] == -1).sum()) < 40
    t, s = recipe.times(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.t, t) and torch.equal(one.s, s)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["coupling.kind=independent"], "objective.distance: on an independent coupling only squared"),
        (["coupling.teacher=null"], "coupling.teacher: pairs want exactly one of teacher (a card) and recipe"),
        (["coupling.recipe=digits"], "coupling.teacher: pairs want exactly one of"),
        (["coupling.teacher.guidance=null"], "coupling.guidance: 1.5 wants teacher.guidance"),
        (["coupling.inverted=1.5"], "coupling.inverted: 1.5 must lie in [0, 1]"),
        (["coupling.dtype=int8"], "coupling.dtype: 'int8' is not one of auto, uint8, float16, float32"),
        (["coupling.num=0"], "coupling.num: 0 must be 1 or more"),
        (
            ["coupling.inverted=0.1", "coupling.solver={kind: anchored}"],
            "coupling.solver: the anchored rule runs from noise to data only",
        ),
        (
            ["teacher.guidance={kind: classifier_free}"],
            "teacher.guidance: objective rectified does not call the teacher",
        ),
        (
            ["objective.distance={kind: lpips_huber, net: pixels}"],
            "objective.distance.net: 'pixels' is not one of lpips, lpips_alex",
        ),
        (
            [
                "objective.distance={kind: lpips_huber, net: efficientnet_lite0}",
                "metrics=[{kind: frechet, features: efficientnet_lite0}]",
            ],
            "objective.distance.net: 'efficientnet_lite0' is also a metric's",
        ),
        (
            ["objective.distance={kind: adaptive}"],
            "objective.distance.kind: no 'adaptive'; allowed: squared, pseudo_huber, lpips_huber",
        ),
        (
            ["objective.distance={kind: lpips_huber}", "data={kind: latents, root: r}"],
            "objective.distance: needs pictures, and nothing decodes",
        ),
        (["objective={kind: endpoint}", "coupling.kind=independent"], "coupling: objective endpoint is for pairs"),
        (["objective={kind: endpoint}", "path.kind=trig"], "path: "),
        (
            ["objective={kind: endpoint}", "teacher.guidance={kind: classifier_free}"],
            "teacher.guidance: objective endpoint does not call",
        ),
        (
            ["objective={kind: endpoint, perceptual_after_steps: 3}"],
            "objective.perceptual_after_steps, squared: have no effect",
        ),
        (
            ["objective={kind: endpoint, perceptual: {kind: vgg}}"],
            "objective.perceptual.kind: no 'vgg'; allowed: network, pictures",
        ),
        (
            ["objective={kind: endpoint, perceptual: {kind: pictures}}", "data={kind: latents, root: r}"],
            "objective.perceptual: needs pictures",
        ),
        (
            [
                "objective={kind: endpoint, perceptual: {kind: network, net: efficientnet_lite0}}",
                "metrics=[{kind: frechet, features: efficientnet_lite0}]",
            ],
            "objective.perceptual.net: 'efficientnet_lite0' is also a metric's",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(overrides, says):
    with pytest.raises(RecipeError) as caught:
        read_recipe("rfpp/digits", overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_squared_distance_stands_on_an_independent_coupling():
    recipe = read_recipe("rfpp/digits", ["coupling.kind=independent", "objective.distance={kind: squared}"])
    assert type(recipe.coupling).__name__ == "Independent"
