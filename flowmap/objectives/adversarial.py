"""Adversarial finetuning: train a distilled student by its own objective and by a discriminator of its few-step
samples.

Source: Align Your Flow, arXiv:2506.14603 (section on adversarial finetuning). The loss is that of R3GAN,
arXiv:2501.05441: relativistic pairing with zero-centred gradient penalties. A discriminator D(x, cond, noise) gives one
score (B,) per sample, higher for data.

    D      softplus(D(fake) - D(real)) + r1/2 |dD/dx (real)|^2 + r2/2 |dD/dx (fake)|^2
    G      softplus(D(real) - D(fake)),   fake the student's sample in k steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import BelowOne, Calls, CountFromZero, FromZero, Rate, check_ranges
from flowmap.base.schema import added
from flowmap.flow.parts import BaseObjective, complete
from flowmap.flow.types import Cond, FlowMap, Loss, Objective, PathSample, RecipeView, Teacher
from flowmap.objectives.drawing import DrawingObjective
from flowmap.objectives.perceptual import check_unmeasured
from flowmap.objectives.reconstruction import Reconstruction

Scores = Callable[[Tensor, Cond | None, Tensor | None], Tensor]
MOST = 1e4  # the largest adaptive factor, for a gradient that vanishes


class DiscriminatorSpec(Protocol):
    """The settings of a discriminator.

    trunk: the network that it takes features from: "none", the "teacher"'s, or "features" of a published one.
    """

    @property
    def trunk(self) -> str: ...

    @property
    def build(self) -> Callable[..., nn.Module]: ...


@runtime_checkable
class FeaturesSpec(DiscriminatorSpec, Protocol):
    """The settings of a discriminator on the features of the network `net`."""

    @property
    def net(self) -> str: ...


@dataclass(frozen=True)
class Adversarial(DrawingObjective):
    """The distillation loss of `base` plus the pairing loss of the student's samples.

    steps       the step counts of the samples; each training step draws one of them
    balance     the loss that is multiplied by `weight` times the ratio of the two gradients' norms at the student's
                last layer: "base" (the paper's, weight 0.1) or "adversarial"; with "none" the adversarial loss is
                multiplied by `weight` alone
    r1, r2      weights of the gradient penalties on data and on samples
    through     whether the gradient of a sample passes through its "last" jump or through "all"
    start       the step before which only the discriminator uses the samples, and the student descends the base's loss
    discriminator_start  the step before which the discriminator does not learn either: such a step costs no more than
                one of the base; at most `start`

    The discriminator's learning rate follows the student's schedule, of which a late start has the end alone.
    """

    base: Objective
    discriminator: DiscriminatorSpec
    steps: tuple[Calls, ...] = (1, 2, 4)
    weight: FromZero = 0.1
    balance: str = "base"
    r1: FromZero = 0.1
    r2: FromZero = 0.1
    through: str = "last"
    start: CountFromZero = 0
    discriminator_lr: Rate = 2e-5
    discriminator_betas: tuple[BelowOne, BelowOne] = (0.0, 0.99)
    discriminator_start: CountFromZero = added(0)

    def __post_init__(self):
        check_ranges(self)
        complete(type(self.base), BaseObjective)
        if self.balance not in ("base", "adversarial", "none"):
            raise ValueError(f"balance: {self.balance!r} is not one of base, adversarial, none")
        self.check_drawing()
        if self.discriminator_start > self.start:
            raise ValueError(f"discriminator_start: {self.discriminator_start} is more than start, {self.start}")
        if isinstance(self.base, (Adversarial, Reconstruction)):
            raise ValueError("base: must be an objective that trains a flow map, not adversarial or reconstruction")

    @property
    def diagonal(self) -> bool:  # type: ignore[override]  # a constant of other kinds
        return self.base.diagonal

    @property
    def distillation(self) -> Objective:
        return self.base.distillation

    @property
    def matching(self) -> Any:
        return self.base.matching

    def check(self, recipe: RecipeView) -> None:
        if self.base is not self.distillation:  # which the recipe checks
            self.base.check(recipe)
        key, spec = "objective.discriminator", self.discriminator
        if recipe.trainer.strategy == "fsdp":
            what = "a discriminator with penalties, which are differentiated twice"
            raise ValueError(f"trainer.strategy: 'fsdp' cannot shard {what}; use ddp")
        if spec.trunk == "teacher" and recipe.teacher is None:
            raise ValueError(f"{key}.kind: 'teacher' needs the features of a teacher, and the recipe has none")
        if spec.trunk == "features":
            if not recipe.data.in_pixels:
                raise ValueError(f"{key}.kind: 'features' needs pictures, and the data's samples are latents")
            assert isinstance(spec, FeaturesSpec)
            check_unmeasured(recipe, spec.net, f"{key}.net", "a discriminator")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The distillation loss alone; train/auxiliary.py adds the discriminator's."""
        return self.base(student, teacher, sample, step)

    def factors(self, of_base: Tensor, of_adversarial: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The factors of the base's and the adversarial loss, from the norms of their gradients at the student's last
        layer.
        """
        one = torch.ones_like(of_base)
        if step < self.start:
            return one, 0 * one
        if self.balance == "base":
            return self.weight * _ratio(of_adversarial, of_base), one
        return one, self.weight * (_ratio(of_base, of_adversarial) if self.balance == "adversarial" else one)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return (above / below.clamp_min(1e-12)).clamp(max=MOST).detach()


def pairing_loss(higher: Tensor, lower: Tensor) -> Tensor:
    """softplus(lower - higher), row by row: small where the scores `higher` (B,) exceed `lower`."""
    return F.softplus(lower - higher)


def start_warnings(objective: Objective, steps: int) -> list[str]:
    """A warning if a run of that many steps ends before its discriminator trains the student."""
    if not isinstance(objective, Adversarial) or objective.start < steps:
        return []
    return [f"objective.start: {objective.start} is not reached in {steps} steps: the student has no discriminator"]


def discriminator_loss(
    scores: Scores,
    real: Tensor,
    fake: Tensor,
    cond: Cond | None = None,
    noise: Tensor | None = None,
    *,
    r1: float,
    r2: float,
) -> Loss:
    """The loss of the discriminator, by one pass of data and samples together.

    real, fake and noise are (B, ...); row i of each has the same condition.
    """
    penalised = r1 > 0 or r2 > 0
    both = torch.cat([real, fake]).detach().requires_grad_(penalised)
    twice = None if cond is None else {key: torch.cat([value, value]) for key, value in cond.items()}
    out = scores(both, twice, None if noise is None else torch.cat([noise, noise]))
    of_real, of_fake = out.chunk(2)
    value = pairing_loss(of_real, of_fake).mean()
    logs = {"score_gap": (of_real - of_fake).mean(), "discriminator_loss": value}
    if penalised:
        on_real, on_fake = squared_gradient(out, both).chunk(2)
        value = value + (r1 * on_real.mean() + r2 * on_fake.mean()) / 2
        logs |= {"r1": on_real.mean(), "r2": on_fake.mean()}
    return Loss(value, {key: log.detach() for key, log in logs.items()})


def squared_gradient(scores: Tensor, x: Tensor) -> Tensor:
    """|d scores_i / d x_i|^2 of each row i, (B,), with its graph; scores (B,) depend on x (B, ...) row by row."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def generator_loss(
    scores: Scores, real: Tensor, fake: Tensor, cond: Cond | None = None, noise: Tensor | None = None
) -> Tensor:
    """The adversarial loss of the student, a scalar that carries grad to `fake`."""
    with torch.no_grad():
        of_real = scores(real, cond, noise)
    return pairing_loss(scores(fake, cond, noise), of_real).mean()
