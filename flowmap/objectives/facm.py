"""FACM: continuous-time consistency, anchored in the flow by flow matching at the same points.

Source: Peng et al. 2025, arXiv:2507.03738; its loss as its public code has it (losses.py, Apache-2.0), as the paper's
full text was not at hand. Clock: 0 data, 1 noise; the paper's clock is reversed. Two calls of the student, which the
paper tells apart by a second time input, or by times above 1, and this house by the arrival time:

    anchor        F(x, t, t) is pulled to v by the mean square, and by 1 - cosine over the channels
    consistency   beta distance(F, sg(F - a clamp(g))),   g = F - v + (t - s) dF/dt,
                  a = 1 - (1 - t)^power,   beta = sin(pi t / 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import FromZero, Positive, Range, check_ranges
from flowmap.flow.derivative import derivative_named, eulerian_derivative
from flowmap.flow.distance import Adaptive, Distance, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, RecipeView, Teacher, broadcast_time
from flowmap.objectives.ayf import off_diagonal


@dataclass(frozen=True)
class FACM(BaseObjective):
    """The sum of both terms; times of kind `consistency`, s = 0, are the paper's, others train a flow map.

    distance    of the consistency term, by default the paper's, |.|^2 / sg(|.|^2 + offset)^(1/2) of the mean square
    anchor      the weight of the anchor; cosine, within it, that of 1 - cosine. Without a teacher cosine must be 0: its
                minimum at a conditional velocity is not the velocity. With one channel its gradient is zero
    power       of the relaxation a, which leaves the target at the student's own value near the data
    clamp       g is limited to this, entry by entry
    derivative  "dual", "forward" or "difference"

    A step has two passes with graph.
    """

    distance: Distance = Adaptive(power=0.5, mean=True)
    anchor: FromZero = 1.0
    cosine: FromZero = 1.0
    power: Annotated[float, Range(0, 8, above=True)] = 0.5
    clamp: Positive = 1.0
    derivative: str = "dual"

    def __post_init__(self):
        check_ranges(self)
        object.__setattr__(self, "derivative", derivative_named(self.derivative))

    def check(self, recipe: RecipeView) -> None:
        if recipe.teacher is None and self.cosine:
            raise ValueError(f"{recipe.key}.cosine: {self.cosine} needs a teacher's velocity; without one it must be 0")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        v = (sample.vt if teacher is None else teacher.velocity(x, t, cond)).detach()
        derive = lambda x, t, s, v, cond, rows: eulerian_derivative(
            student, x, t, s, v, cond, mode=self.derivative, rows=rows
        )
        mean_velocity, rate = off_diagonal(derive, student, sample, v, needed=True)
        own = mean_velocity.detach()
        g = own - v + broadcast_time(t - s, x) * rate
        relaxed = broadcast_time(1 - (1 - t) ** self.power, x) * g.clamp(-self.clamp, self.clamp)
        consistency = torch.sin(t * math.pi / 2) * self.distance(mean_velocity, own - relaxed)
        anchor = self._anchor(student.mean_velocity(x, t, t, cond), v)
        logs = {"consistency_error": consistency, "anchor_error": anchor, "residual_norm": g.flatten(1).norm(dim=1)}
        return Loss((consistency + self.anchor * anchor).mean(), {key: value.detach() for key, value in logs.items()})

    def _anchor(self, velocity: Tensor, v: Tensor) -> Tensor:
        """The error (B,) of the student's velocity."""
        error = Squared()(velocity, v)
        if not self.cosine:
            return error
        cosine = torch.nn.functional.cosine_similarity(velocity.to(error.dtype), v.to(error.dtype), dim=1)
        return error + self.cosine * (1 - cosine).reshape(len(error), -1).mean(1)
