"""Score distillation as a run: two time scales, what is kept and what ships, resuming, micro-batches, a discriminator,
mistakes.
"""

from __future__ import annotations

import signal

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.fake_score import build_fake
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.estimate.calls import Calls, calls_of
from flowmap.estimate.dry_run import dry_run
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.train.auxiliary import AuxiliaryModule
from tests.conftest import TINY
from tests.train.test_adversarial_runs import FLOW, checkpoint, quiet
from tests.train.test_resume import assert_same_run, in_process, trace

SCORE = TINY.replace("{kind: ayf_emd, warmup_steps: 12}", "{kind: score_distillation, fake_steps: 3, fake_lr: 2.0e-2}")
SCORE = SCORE.replace("{kind: deterministic, steps: [1, 2]}", "{kind: gamma, gamma: 1.0, steps: [1, 2]}")
SCORE = SCORE.replace(
    "{steps: 20, checkpoint_every_steps: 6, accelerator: cpu}",
    "{steps: 9, checkpoint_every_steps: 3, accumulate: 2, accelerator: cpu}",
)
SCORE = SCORE.replace("{lr: 1.0e-2, schedule: cosine}", "{lr: 1.0e-2, schedule: cosine, clip_norm: 1.0}")


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "score.yaml"
    path.write_text(SCORE)
    return path


def test_the_fake_steps_thrice_as_often_and_does_not_ship(path, tmp_path):
    folder = flowmap.fit(read_recipe(path), tmp_path / "run", log=quiet).folder
    state = checkpoint(folder)
    assert state["global_step"] == 9, "the student's steps"
    counts = [{float(one["step"]) for one in optimizer["state"].values()} for optimizer in state["optimizer_states"]]
    assert counts == [{9.0}, {27.0}]
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "averages", "fake"}
    assert all(name.startswith("net.") for name in read_tensors(folder / "student" / "model.safetensors"))
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in state["optimizer_states"]]
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[0] == pytest.approx(
        read_recipe(path).optimizer.lr_at(8, 9)
    )
    rows = trace(folder)
    assert [row["step"] for row in rows] == [str(step) for step in range(9)]
    assert all(float(row["train/fake_loss"]) > 0 and float(row["train/residual_norm"]) > 0 for row in rows)
    assert {float(row["train/jumps"]) for row in rows} <= {1.0, 2.0, 3.0, 4.0}
    assert flowmap.load_student(folder).sample(2, steps=2).shape == (2, 2)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(path, tmp_path):
    """The fake and both optimisers among it, bit by bit; killed inside a step's second micro-batch."""
    assert in_process(path, tmp_path / "whole") == 0
    assert in_process(path, tmp_path / "killed", {"kind": "rename", "count": 9}) == -signal.SIGKILL
    assert 0 < checkpoint(tmp_path / "killed")["global_step"] < 9, "resumed from within the run"
    assert in_process(path, tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def stepped(path, *overrides):
    """A module with a stand-in for the trainer that counts no steps."""
    recipe = read_recipe(path, overrides)
    run = resolve(recipe)
    data = build_data(run)
    teacher = build_teacher(run, data)
    config = student_config(run, data, teacher)
    parts = (run, build_student(run, config, teacher), teacher, data, data)
    return AuxiliaryModule(*parts, fake=build_fake(run, config, teacher))


def test_each_step_is_of_all_micro_batches(path, monkeypatch):
    """Gradients of a step of two micro-batches, the fake's last and the student's, are the means of those of either."""
    module, taken = stepped(path, "objective.fake_steps=1"), []
    trainer = type("T", (), {"optimizers": module.configure_optimizers(), "world_size": 1})()
    for name, value in (("global_step", 0), ("global_rank", 0), ("trainer", trainer)):
        monkeypatch.setattr(AuxiliaryModule, name, value)
    look = lambda self, optimizer, parameters, name=None: (
        taken.append((name, [p.grad.clone() for p in parameters if p.grad is not None])),
        optimizer.zero_grad(),
    )
    monkeypatch.setattr(AuxiliaryModule, "_step", look)
    monkeypatch.setattr(
        AuxiliaryModule,
        "optimizers",
        lambda self: [type("O", (), {"optimizer": o, "zero_grad": o.zero_grad})() for o in trainer.optimizers],
    )
    batches = [module.data.__getitems__(list(range(i, i + 16))) for i in (0, 16)]
    for batch in batches:
        module.training_step(batch, 0)
    assert [name for name, _ in taken] == ["fake", None], "nothing steps before the last micro-batch"
    together = dict(taken)
    apart = []
    for micro, batch in enumerate(batches):
        taken.clear()
        module._micro = micro
        drawn = [module.draw(batch)]
        module._fake_step(drawn)
        module.descend(*drawn[0], 1.0)
        module.step_student()
        apart.append(dict(taken))
    for name in ("fake", None):
        for whole, one, other in zip(together[name], apart[0][name], apart[1][name], strict=True):
            torch.testing.assert_close(whole, (one + other) / 2, rtol=1e-4, atol=1e-6)


def test_the_students_step_leaves_no_gradient_in_the_fake(path, monkeypatch):
    module = stepped(path)
    trainer = type("T", (), {"optimizers": module.configure_optimizers(), "world_size": 1})()
    for name, value in (("global_step", 0), ("global_rank", 0), ("trainer", trainer)):
        monkeypatch.setattr(AuxiliaryModule, name, value)
    module._fake_loss = torch.zeros(())
    sample, generator = module.draw(module.data.__getitems__(list(range(16))))
    module.descend(sample, generator, 1.0)
    assert all(p.grad is None for p in module.fake.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in module.student.parameters() if p.grad is not None)


@pytest.mark.slow
def test_it_comes_nearer_to_the_teachers_law(path, tmp_path):
    """Frechet distance at one step (measured: .33 to .05; the teacher's four Euler steps .07, the floor .03)."""
    settings = [
        "trainer.steps=150",
        "trainer.accumulate=1",
        "data.batch_size=64",
        "trainer.checkpoint_every_steps=150",
        "student.width=48",
    ]
    settings += [
        "times={kind: uniform}",
        "optimizer.lr=3e-3",
        "objective.fake_lr=1e-2",
        "ema={kind: constant, decay: 0.9}",
    ]
    found = []
    for steps in (1, 150):
        run = flowmap.fit(read_recipe(path, [*settings, f"trainer.steps={steps}"]), tmp_path / str(steps), log=quiet)
        found.append(run.metrics["student"]["1"]["frechet_pixels"])
    assert found[1] < found[0] / 3


def test_beside_a_discriminator_and_from_its_teacher(tmp_path, monkeypatch):
    """Three networks; the fake starts as the teacher, told the guidance scale, whatever the student starts from."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    flow = tmp_path / "flow.yaml"
    flow.write_text(FLOW)
    text = FLOW.replace("name: flow", "name: three").replace(
        "{kind: flow_matching}", "{kind: score_distillation, fake_steps: 2}"
    )
    text = text.replace("{kind: deterministic, steps: [2]}", "{kind: gamma, gamma: 1.0, steps: [1]}")
    text = (
        text.replace("{kind: dit, preset: nano, depth: 1}", "{kind: from_teacher}") + "evaluation: {teacher_steps: 2}\n"
    )
    path = tmp_path / "three.yaml"
    path.write_text(text + f"teacher: {{recipe: {flow}, guidance: {{kind: classifier_free}}}}\n")
    judged = "objective={kind: adversarial, base: {kind: score_distillation, fake_steps: 2}, "
    judged += "discriminator: {kind: conv, width: 4}, balance: none}"
    assert "fake score: 0." in "\n".join(dry_run(read_recipe(path), None))
    folder = flowmap.fit(read_recipe(path, [judged]), tmp_path / "judged", log=quiet).folder
    state = checkpoint(folder)
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "averages", "fake", "discriminator"}
    counts = [{float(one["step"]) for one in optimizer["state"].values()} for optimizer in state["optimizer_states"]]
    assert counts == [{2.0}, {4.0}, {2.0}]
    recipe = read_recipe(path, [f"student={{kind: from_recipe, recipe: {path}}}"])
    run = resolve(recipe)
    teacher = build_teacher(run, build_data(run))
    fake = build_fake(run, flowmap.load_student(folder).config, teacher)
    x, t, cond = (
        torch.randn(3, 1, 8, 8),
        torch.rand(3),
        {"class": torch.tensor([1, 2, -1]), "guidance": torch.tensor([1.0, 2.0, 3.0])},
    )
    torch.testing.assert_close(fake.velocity(x, t, cond), teacher.network.flow_map.velocity(x, t, cond))
    assert not any("arrival" in name for name in fake.state_dict()) and all(p.requires_grad for p in fake.parameters())


def test_every_networks_calls_are_counted(path):
    """A step: (1 + 3/2 + 5/2)/3 jumps for each step of fake and student, the fake's four passes, the teacher's one."""
    calls = calls_of(read_recipe(path), conditional=False)
    assert calls.forward == pytest.approx(4 * 5 / 3 + 4) and (calls.backward, calls.strong, calls.weak) == (4, 1, 0)
    whole = ["objective={kind: score_distillation, fake_steps: 2, steps: [1, 3], through: all}"]
    assert calls_of(read_recipe(path, whole), conditional=False) == Calls(2 * 3 + 3, 2 + 2, 1, 0)
    guided = calls_of(read_recipe("digits-dmd"), conditional=True)
    assert (guided.strong, guided.weak) == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher=null"], "teacher: objective score_distillation compares with a teacher's velocity"),
        (["trainer.strategy=fsdp"], "trainer.strategy: 'fsdp' cannot shard the fake"),
        (
            ["coupling={kind: pairs, num: 8, teacher: {card: exact}}"],
            "coupling: objective score_distillation compares laws, not pairs",
        ),
        (
            ["prior={kind: learned, recipe: lediflow/digits-prior}", "sampler={kind: deterministic}"],
            "prior: objective score_distillation adds noise from N(0, I)",
        ),
        (
            ["sampler={kind: deterministic}"],
            "objective.through: 'last' trains jumps to the data alone; "
            "allowed: 'all', or sampler {kind: gamma, gamma: 1}",
        ),
        (["sampler.gamma=0.5"], "objective.through: 'last' trains jumps to the data alone"),
        (["objective.fake_steps=0"], "objective.fake_steps: 0 must be 1 or more"),
        (["objective.fakesteps=2"], "objective.fakesteps: no such setting, did you mean 'fake_steps'?"),
    ],
)
def test_a_mistake_is_one_line(path, overrides, says):
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_other_samplers_are_for_whole_runs_or_one_step(path):
    read_recipe(path, ["sampler={kind: deterministic}", "objective.through=all"])
    read_recipe(path, ["sampler={kind: deterministic}", "objective.steps=[1]"])
