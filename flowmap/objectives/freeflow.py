"""FreeFlow: train a flow map from noise alone, without data, by the Lagrangian identity at t = 1.

Source: Tong, Ma, Xie, Jaakkola 2025, arXiv:2511.19428: its prediction objective, in the continuous form. Its correction
objective, which trains a second network, is not implemented. Clock: 0 data, 1 noise; the paper's duration is 1 - s.

    F(x1, 1, s) = v(f, s) + (1 - s) dF/ds,   f = x1 - (1 - s) F
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flowmap.flow.derivative import derivative_named, lagrangian_derivative
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time


@dataclass(frozen=True)
class FreeFlow(BaseObjective):
    """distance(F(x1, 1, s), sg(v(f, s) + (1 - s) dF/ds)), from the sample's noise, arrival time and condition.

    Such a student jumps from t = 1 only. distance: the paper's weight is not known; `adaptive` is MeanFlow's.
    derivative: "dual", "forward" or "difference".
    """

    distance: Distance = Squared(mean=False)
    derivative: str = "dual"

    def __post_init__(self):
        object.__setattr__(self, "derivative", derivative_named(self.derivative))

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        if teacher is None:
            raise ValueError("objective.kind: freeflow evaluates a teacher where the student arrives; add a teacher")
        x, s, cond = sample.x1, sample.s, sample.cond
        mean_velocity, rate = lagrangian_derivative(student, x, torch.ones_like(s), s, cond, mode=self.derivative)
        length = broadcast_time(1 - s, x)
        arrival = (x - length * mean_velocity.detach()).to(x.dtype)
        target = teacher.velocity(arrival, s, cond) + length * rate
        residual = (mean_velocity.detach() - target).flatten(1).norm(dim=1)
        error = self.distance(mean_velocity, target.detach())
        return Loss(error.mean(), {"residual_norm": residual, "tangent_norm": rate.flatten(1).norm(dim=1)})
