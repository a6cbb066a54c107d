"""Runs of reward tuning: rewards rise, a resumed run is the whole run, and combinations that cannot be are refused."""

from __future__ import annotations

import signal

import pytest

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.estimate.calls import sampling_calls
from flowmap.estimate.dry_run import dry_run
from flowmap.recipe import read_recipe
from tests.train.test_adversarial_runs import checkpoint
from tests.train.test_resume import assert_same_run, in_process

REWARD = (
    "objective={kind: reward_tuning, base: {kind: ayf_emd, warmup_steps: 12}, reward: {kind: symmetry}, steps: [1, 2]}"
)
KL = ["objective.base={kind: score_distillation, steps: [1], fake_steps: 1}", "times={kind: uniform}"]


def fitted(tiny, tmp_path, *overrides):
    folder = tmp_path / f"run-{abs(hash(overrides))}"
    return flowmap.fit(read_recipe(tiny, [REWARD, *overrides]), folder, log=lambda line: None).folder


def reward_of(folder):
    """The mean symmetry of one-step samples."""
    x = flowmap.load_student(folder).sample(500, steps=1)
    return -float((x - x.flip(-1)).square().mean())


@pytest.mark.parametrize("base", [[], pytest.param(KL, marks=pytest.mark.slow)], ids=["flow map", "score distillation"])
def test_a_reward_rises_with_its_scale(tiny, tmp_path, base):
    without, some, much = (
        reward_of(fitted(tiny, tmp_path, *base, f"objective.scale={scale}")) for scale in (0.0, 1.0, 20.0)
    )
    assert without < some < much and much > 0.7 * without


def test_the_log_has_the_reward_and_a_step_starts_it(tiny, tmp_path):
    folder = fitted(tiny, tmp_path, "objective.start=10")
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    place = rows[0].index("train/reward")
    assert not rows[1][place] and float(rows[-1][place]) < 0


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(tiny, tmp_path):
    """Bit by bit, the noise of the rewarded samples among it; killed inside a step's second micro-batch."""
    short = ["trainer.steps=9", "trainer.checkpoint_every_steps=3", "trainer.accumulate=2"]
    recipe = read_recipe(tiny, [REWARD, "sampler={kind: gamma, gamma: 0.5, steps: [1, 2]}", *short])
    path = tmp_path / "short.yaml"
    path.write_text(recipe.to_yaml())
    assert in_process(path, tmp_path / "whole") == 0
    assert in_process(path, tmp_path / "killed", {"kind": "rename", "count": 9}) == -signal.SIGKILL
    assert 0 < checkpoint(tmp_path / "killed")["global_step"] < 9, "resumed from within the run"
    assert in_process(path, tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_its_samples_are_counted(tiny):
    recipe = read_recipe(tiny, [REWARD])
    assert sampling_calls(recipe) == (1.5, 1.0)
    assert sampling_calls(read_recipe(tiny, [REWARD, "objective.through=all"])) == (1.5, 1.5)
    alone = sampling_calls(read_recipe(tiny, ["objective={kind: score_distillation, steps: [1]}"]))
    kl = read_recipe(tiny, [REWARD, "objective.base={kind: score_distillation, steps: [1]}"])
    assert sampling_calls(kl) == alone, "it rewards the samples that its base draws"
    assert any("FLOP" in line for line in dry_run(recipe, None))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((REWARD, "objective.base={kind: flow_matching}"), "objective.base: trains a velocity"),
        ((REWARD, "trainer.strategy=fsdp"), "trainer.strategy: 'fsdp'"),
        ((REWARD, "objective.reward={kind: inkk}"), "objective.reward.kind: no 'inkk', did you mean 'ink'"),
        (
            (
                "objective={kind: adversarial, discriminator: {kind: conv}, base: {kind: reward_tuning, "
                "base: {kind: ayf_emd}, reward: {kind: ink}}}",
            ),
            "objective.base: reward_tuning is no base",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(tiny, overrides, says):
    with pytest.raises(RecipeError, match=says.replace("(", r"\(")):
        read_recipe(tiny, list(overrides))
