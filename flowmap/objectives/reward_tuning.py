"""Reward tuning: raise a reward of the student's samples, anchored to the teacher by the objective `base`.

    loss = base - scale E[ r(x0) ],    x0 the student's sample in k steps, with its graph

A flow-map objective as base anchors the map: each jump is pulled to the teacher's. Score distillation as base anchors
the law, by the KL divergence: KL(q || p) - lambda E_q[r] is least at q = p exp(lambda r) / Z. Its gradient without
`normalised` is that of the divergence at noise level t times t^2 / D, for D numbers a sample, to leading order. So at
times near t lambda is scale D / t^2, and the minimum tends to the tilted law as t falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowmap.base.ranges import Calls, CountFromZero, FromZero, check_ranges
from flowmap.flow.reward import Reward, rewards_of
from flowmap.flow.types import Cond, FlowMap, Loss, Objective, PathSample, RecipeView, Teacher
from flowmap.objectives.adversarial import Adversarial
from flowmap.objectives.drawing import DrawingObjective
from flowmap.objectives.reconstruction import Reconstruction


@dataclass(frozen=True)
class RewardTuning(DrawingObjective):
    """The loss of `base` minus `scale` times the mean reward of the student's samples.

    reward      r(x, cond) (B,), with a gradient to x; latents are decoded first
    steps       the step counts of the samples; each training step draws one of them. Score distillation draws its own
                samples, by its own settings, and they are rewarded
    through     whether the gradient of a sample passes through its "last" jump or through "all"
    start       the step before which the base's loss is descended alone
    """

    base: Objective
    reward: Reward
    scale: FromZero = 1.0
    steps: tuple[Calls, ...] = (1, 2, 4)
    through: str = "last"
    start: CountFromZero = 0

    def __post_init__(self):
        check_ranges(self)
        self.check_drawing()
        if isinstance(self.base, (Adversarial, Reconstruction, RewardTuning)):
            raise ValueError("base: must be an objective that trains a flow map, not one that adds a loss to another")

    @property
    def distillation(self) -> Objective:
        return self.base.distillation

    @property
    def matching(self) -> Any:
        return self.base.matching

    @property
    def sees_pictures(self) -> bool:
        return True

    @property
    def own_samples(self) -> bool:
        """Whether samples are drawn for the reward; otherwise the base draws them."""
        return self.base.matching is not self.base

    def check(self, recipe: RecipeView) -> None:
        if recipe.objective is not self:
            raise ValueError("objective.base: reward_tuning is no base; give it the other objective as its own")
        if self.base is not self.distillation:  # which the recipe checks
            self.base.check(recipe)
        if self.base.diagonal:
            raise ValueError("objective.base: trains a velocity, which has no samples in few steps; use another")
        if recipe.trainer.strategy == "fsdp":
            raise ValueError("trainer.strategy: 'fsdp' does not step the two losses of reward_tuning; use ddp")
        if not recipe.data.in_pixels and recipe.data.autoencoder is None:
            what = "nothing decodes the latents of this data: give it an autoencoder"
            raise ValueError(f"objective.reward: rewards pictures, and {what}")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The base's loss alone; train/reward.py adds the reward of samples."""
        return self.base(student, teacher, sample, step)

    def with_reward(self, base: Loss, student: Any, x0: Tensor, cond: Cond | None) -> Loss:
        """The base's loss minus the scaled reward of the student's samples x0, which carry their graph."""
        found = rewards_of(self.reward, student, x0, cond)
        if self.scale > 0 and not found.requires_grad:
            raise ValueError("objective.reward: has no gradient, by which a student could be tuned")
        mean = found.mean()
        return Loss(base.value - self.scale * mean, {**base.logs, "reward": mean.detach(), "base": base.value.detach()})
