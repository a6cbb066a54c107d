"""InstaFlow's last stage: one step from the noise of a pair must end where the pair ends, first by squares, then as pictures are seen.

Source: Liu, Zhang, Ma, Peng, Liu 2023, arXiv:2309.06380. Clock: 0 data, 1 noise. The pairs are those of a reflowed model, whose paths are
nearly straight, so that its end points are nearly a smooth function of the noise: reflow first, then distil.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import CountFromZero, Share, check_ranges
from flowmap.flow.distance import Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, RecipeView, Teacher
from flowmap.objectives.perceptual import check_name, check_pictures, distance_by, pictures_of
from flowmap.objectives.rectified import check_straight


class PictureDistance(Protocol):
    """d(a, b) (B,) between pictures, which carries grad to a."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Network:
    """The distance in that network, as `lpips_huber` names it (perceptual.py)."""

    net: str = "lpips"

    def __post_init__(self):
        check_name(self.net)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return distance_by(self.net, a, b)


@dataclass(frozen=True)
class Pictures:
    """The mean square over pixels: in latents, what the decoder makes of an error, where no second perceptual network is at hand."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return Squared()(a, b)


PICTURE_DISTANCES = {"network": Network, "pictures": Pictures}


@dataclass(frozen=True)
class Endpoint(BaseObjective):
    """d(f(x1, 1, 0), x0) of the pair: squared until step `perceptual_after_steps`, then squared * that + (1 - squared) * `perceptual`.

    Without `perceptual` it is the squared error to the end. The sample's times play no part, nor does a teacher.
    """

    perceptual: PictureDistance | None = None
    perceptual_after_steps: CountFromZero = 0
    squared: Share = 0.0
    diagonal: ClassVar[bool] = True  # one network call from noise: an arrival time would be a constant

    def __post_init__(self):
        check_ranges(self)
        if self.perceptual is None and (self.perceptual_after_steps or self.squared):
            raise ValueError(
                "perceptual_after_steps, squared: say when and how much of `perceptual`, which is not given"
            )

    def check(self, recipe: RecipeView) -> None:
        if not recipe.coupling.paired:
            raise ValueError(
                "coupling: objective endpoint is for pairs, whose noise says where to end; on independent ones it learns the mean"
            )
        check_straight(recipe, "endpoint")
        if self.sees_pictures:
            check_pictures(recipe, self.loss_net, "perceptual")

    @property
    def sees_pictures(self) -> bool:
        return self.perceptual is not None

    @property
    def loss_net(self) -> str | None:
        """The network that the loss looks through, which no metric may share."""
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
