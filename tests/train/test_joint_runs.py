"""Joint training as a run: the base's loss and the term's, who steps, the schedule of lambda, resuming, mistakes."""

from __future__ import annotations

import signal

import pytest

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.estimate.calls import Calls, calls_of
from flowmap.estimate.dry_run import dry_run
from flowmap.recipe import read_recipe
from tests.conftest import TINY
from tests.train.test_adversarial_runs import checkpoint, quiet
from tests.train.test_resume import assert_same_run, in_process, trace

BASE = "{kind: ayf_mixed, warmup_steps: 4, own_lagrangian: 1.0}"
JOINT = TINY.replace(
    "{kind: ayf_emd, warmup_steps: 12}",
    f"{{kind: joint, base: {BASE}, term: {{kind: reverse_kl, fake_steps: 2}}, start: 2, warmup_steps: 3, weight: 2.0}}",
).replace(
    "{steps: 20, checkpoint_every_steps: 6, accelerator: cpu}",
    "{steps: 9, checkpoint_every_steps: 3, accumulate: 2, accelerator: cpu}",
)
SELF = "objective.term={kind: self_fake}"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "joint.yaml"
    path.write_text(JOINT)
    return path


def test_both_networks_step_and_lambda_rises_from_its_start(path, tmp_path):
    folder = flowmap.fit(read_recipe(path), tmp_path / "run", log=quiet).folder
    state = checkpoint(folder)
    assert state["global_step"] == 9
    counts = [{float(one["step"]) for one in optimizer["state"].values()} for optimizer in state["optimizer_states"]]
    assert counts == [{9.0}, {14.0}], "the fake has two steps from step 2 on"
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "averages", "fake"}
    assert all(name.startswith("net.") for name in read_tensors(folder / "student" / "model.safetensors"))
    weights = [row.get("train/term_weight") for row in trace(folder)]
    assert [float(w) if w else None for w in weights] == pytest.approx([None, None, 0.5, 1.0, 1.5, 2, 2, 2, 2])
    assert flowmap.load_student(folder).sample(2, steps=2).shape == (2, 2)


def test_before_its_start_it_is_the_base(path, tmp_path):
    late = flowmap.fit(read_recipe(path, ["objective.start=9"]), tmp_path / "late", log=quiet).folder
    alone = flowmap.fit(read_recipe(path, [f"objective={BASE}"]), tmp_path / "alone", log=quiet).folder
    one, other = (read_tensors(folder / "student" / "model.safetensors") for folder in (late, alone))
    assert all(bool((one[name] == other[name]).all()) for name in other)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["objective.term.fake_steps=2", SELF])
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(path, tmp_path, term):
    """Bit by bit; killed inside a step's second micro-batch."""
    path.write_text(read_recipe(path, [term]).to_yaml())
    assert in_process(path, tmp_path / "whole") == 0
    assert in_process(path, tmp_path / "killed", {"kind": "rename", "count": 9}) == -signal.SIGKILL
    assert 0 < checkpoint(tmp_path / "killed")["global_step"] < 9, "resumed from within the run"
    assert in_process(path, tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_self_fake_has_no_second_network(path, tmp_path):
    folder = flowmap.fit(read_recipe(path, [SELF]), tmp_path / "run", log=quiet).folder
    state = checkpoint(folder)
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "averages"}
    assert len(state["optimizer_states"]) == 1 and state["global_step"] == 9
    assert "fake score" not in "\n".join(dry_run(read_recipe(path, [SELF]), None))


def test_the_dry_run_counts_every_network(path):
    """2 fake steps of (1 + 2 + 4)/3 jumps and a pass each; the term's own jumps, and its call of the fake."""
    base = calls_of(read_recipe(path, [f"objective={BASE}"]), conditional=False)
    whole = calls_of(read_recipe(path), conditional=False)
    added = (3 * 7 / 3 + 3, 1 + 2, 1, 0)
    assert whole == Calls(*(pytest.approx(a + b) for a, b in zip(vars(base).values(), added, strict=True)))
    assert "fake score: 0." in "\n".join(dry_run(read_recipe(path), None))
    own = calls_of(read_recipe(path, [SELF]), conditional=False)
    assert own.forward == pytest.approx(base.forward + 7 / 3 + 2) and own.backward == base.backward + 1


def test_a_discriminator_is_a_third_loss():
    judged = f"{{kind: adversarial, base: {JOINT.split('objective: ')[1].splitlines()[0]}, "
    judged += "discriminator: {kind: conv, width: 4}, balance: none}"
    recipe = read_recipe("digits", [f"objective={judged}"])
    assert recipe.key == "objective.base.base" and recipe.objective.matching is recipe.objective.base
    assert "fake score" in "\n".join(dry_run(recipe, None)) and "discriminator" in "\n".join(dry_run(recipe, None))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher=null"], "teacher: objective joint compares with a teacher's velocity; add a teacher"),
        (["trainer.strategy=fsdp"], "trainer.strategy: 'fsdp' cannot shard the fake of objective joint"),
        (["objective.steps=[]"], "objective.steps: () must be whole numbers from 1"),
        (["objective.through=first"], "objective.through: 'first' is not one of last, all"),
        (["objective.base={kind: score_distillation}"], "objective.base: must be an objective that trains a flow map"),
        (["objective.term={kind: fake}"], "objective.term.kind: no 'fake'"),
        (["objective.base.lagrangian=2"], "objective.base.lagrangian: 2"),
    ],
)
def test_a_mistake_is_one_line(path, overrides, says):
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)
