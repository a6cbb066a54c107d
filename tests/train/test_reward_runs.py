"""Runs of reward tuning: rewards rise, a resumed run is the whole run, and combinations that cannot be are refused."""

from __future__ import annotations

import pytest

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.estimate.calls import sampling_calls
from flowmap.estimate.dry_run import dry_run
from flowmap.recipe import read_recipe

REWARD = (
    "objective={kind: reward_tuning, base: {kind: ayf_emd, warmup_steps: 12}, reward: {kind: symmetry}, steps: [1, 2]}"
)
KL = ["objective.base={kind: score_distillation, steps: [1], fake_steps: 1}", "times={kind: uniform}"]


def fitted(tiny, tmp_path, *overrides, resume=False):
    folder = tmp_path / f"run-{abs(hash(overrides))}"
    return flowmap.fit(read_recipe(tiny, [REWARD, *overrides]), folder, log=lambda line: None, resume=resume).folder


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
