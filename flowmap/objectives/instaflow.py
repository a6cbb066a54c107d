"""InstaFlow's last stage: one step from the noise of a pair ends at its data, by squared error and then by a perceptual
distance.

Source: Liu, Zhang, Ma, Peng, Liu 2023, arXiv:2309.06380. Clock: 0 data, 1 noise. The pairs come from a reflowed model:
its paths are nearly straight, so its endpoints are nearly a smooth function of the noise. Reflow first, then distil.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import CountFromZero, Share, check_ranges
from flowmap.flow.distance import Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.reward import pictures_of
from flowmap.flow.types import FlowMap, Loss, PathSample, RecipeView, Teacher
from flowmap.objectives.perceptual import check_name, check_pictures, distance_by
from flowmap.objectives.rectified import check_straight


class PictureDistance(Protocol):
    """d(a, b) (B,) between pictures, which carries grad to a."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Network:
    """The perceptual distance in a network, named as for `lpips_huber` (perceptual.py)."""

    net: str = "lpips"

    def __post_init__(self):
        check_name(self.net)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return distance_by(self.net, a, b)


@dataclass(frozen=True)
class Pictures:
    """The mean square over pixels. For latents it measures the decoded error, without a second perceptual network."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return Squared()(a, b)


PICTURE_DISTANCES = {"network": Network, "pictures": Pictures}


@dataclass(frozen=True)
class Endpoint(BaseObjective):
    """d(f(x1, 1, 0), x0) of the pair, with d the squared error until step `perceptual_after_steps`.

    From then on d is squared * the squared error + (1 - squared) * `perceptual`. Without `perceptual` it stays the
    squared error. Neither the sample's times nor a teacher are used.
    """

    perceptual: PictureDistance | None = None
    perceptual_after_steps: CountFromZero = 0
    squared: Share = 0.0
    diagonal: ClassVar[bool] = True  # one call from noise: an arrival time would be constant

    def __post_init__(self):
        check_ranges(self)
        if self.perceptual is None and (self.perceptual_after_steps or self.squared):
            raise ValueError("perceptual_after_steps, squared: have no effect without `perceptual`")

    def check(self, recipe: RecipeView) -> None:
        if not recipe.coupling.paired:
            why = "on an independent coupling it learns the mean of the data"
            raise ValueError(f"coupling: objective endpoint is for pairs; {why}")
        check_straight(recipe, "endpoint")
        if self.sees_pictures:
            check_pictures(recipe, self.loss_net, "perceptual")

    @property
    def sees_pictures(self) -> bool:
        return self.perceptual is not None

    @property
    def loss_net(self) -> str | None:
        """The network of the perceptual distance, which no metric may use."""
        return self.perceptual.net if isinstance(self.perceptual, Network) else None

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        one = torch.ones_like(sample.t)
        arrival = student(sample.x1, one, torch.zeros_like(one), sample.cond)
        error = Squared()(arrival, sample.x0)
        if self.perceptual is None or step < self.perceptual_after_steps:
            return Loss(error.mean(), {"squared": error.mean().detach()})
        with torch.no_grad():
            wanted = pictures_of(student, sample.x0)
        seen = self.perceptual(pictures_of(student, arrival), wanted)
        value = self.squared * error + (1 - self.squared) * seen
        return Loss(value.mean(), {"squared": error.mean().detach(), "perceptual": seen.mean().detach()})
