"""Improved rectified flow (2-rectified flow++): flow matching on pairs of noise and data that a teacher's ODE has
joined.

Source: Lee, Lin, Fanti 2024, arXiv:2405.20320. Clock: 0 data, 1 noise. On pairs the velocity at xt is (nearly) a
function of xt, not an average over many data, so distances other than the squared one have the same minimum. On an
independent coupling they do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import Positive, check_ranges
from flowmap.flow.distance import PseudoHuber, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.path import Linear
from flowmap.flow.reward import pictures_of
from flowmap.flow.types import FlowMap, Loss, PathSample, RecipeView, Teacher, broadcast_time
from flowmap.objectives.perceptual import check_name, check_pictures, distance_by

EDGE = 1e-5  # the least t of U-shaped times, and of 1 / t


class RectifiedDistance(Protocol):
    """d (B,): of velocities and their targets, or, for `lpips_huber`, of velocities, the sample and the student."""

    def __call__(self, *args: Any) -> Tensor: ...


@dataclass(frozen=True)
class LPIPSHuber:
    """(1 - t) huber(v, x1 - x0) + w(t) LPIPS(x0_hat, x0), with x0_hat = xt - t v.

    weight     "one": w = 1; "inverse_time": w = 1 / t
    net        "lpips" (VGG trunk) or "lpips_alex", by the lpips package, if the trunk's weights are on this machine;
               "efficientnet_lite0", with weights from a package; "random_conv", without weights; or
               "package.mod:attr", a call (a, b) -> (B,) on pictures (B, 3, H, W) of side `attr.size` (by default 224;
               None for any)

    Latents are decoded first.
    """

    scale: Positive = 0.00054
    weight: str = "one"
    net: str = "lpips"

    def __post_init__(self):
        check_ranges(self)
        if self.weight not in ("one", "inverse_time"):
            raise ValueError(f"weight: {self.weight!r} is not one of one, inverse_time")
        check_name(self.net)

    def __call__(self, velocity: Tensor, sample: PathSample, student: FlowMap) -> Tensor:
        huber = PseudoHuber(self.scale)(velocity, sample.x1 - sample.x0)
        guess = sample.xt - broadcast_time(sample.t, sample.xt) * velocity
        with torch.no_grad():
            wanted = pictures_of(student, sample.x0)
        perceptual = distance_by(self.net, pictures_of(student, guess), wanted)
        weight = 1.0 if self.weight == "one" else 1 / sample.t.clamp(min=EDGE)
        return (1 - sample.t) * huber + weight * perceptual


DISTANCES = {"squared": Squared, "pseudo_huber": PseudoHuber, "lpips_huber": LPIPSHuber}


@dataclass(frozen=True)
class Rectified(BaseObjective):
    """The distance between F(xt, t, t) and x1 - x0 of the pair. The teacher is not called: the pairs carry its
    knowledge.
    """

    distance: RectifiedDistance = PseudoHuber()
    diagonal: ClassVar[bool] = True

    def check(self, recipe: RecipeView) -> None:
        if not recipe.coupling.paired and not isinstance(self.distance, Squared):
            why = "on an independent coupling only squared has the velocity as its minimum"
            raise ValueError(f"{recipe.key}.distance: {why}; or give coupling pairs")
        check_straight(recipe, "rectified")
        if self.sees_pictures:
            check_pictures(recipe, self.loss_net, "distance")

    @property
    def sees_pictures(self) -> bool:
        return isinstance(self.distance, LPIPSHuber)

    @property
    def loss_net(self) -> str | None:
        """The network of the perceptual distance, which no metric may use."""
        return self.distance.net if isinstance(self.distance, LPIPSHuber) else None

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        velocity = student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond)
        error = (
            self.distance(velocity, sample, student)
            if self.sees_pictures
            else self.distance(velocity, sample.x1 - sample.x0)
        )
        return Loss(error.mean(), {"error": error.detach()})


def check_straight(recipe: RecipeView, kind: str) -> None:
    """Raise ValueError where a recipe of objective `kind` has curved paths, or guides a teacher that the objective
    never calls.
    """
    if not isinstance(recipe.path, Linear):
        raise ValueError("path: rectified flow has straight paths, so it must be {kind: linear}")
    if recipe.teacher is not None and recipe.teacher.guidance is not None:
        what = f"objective {kind} does not call the teacher; the pairs are guided by coupling.teacher.guidance"
        raise ValueError(f"teacher.guidance: {what}")
