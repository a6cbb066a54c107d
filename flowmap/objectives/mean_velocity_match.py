"""The term mean_velocity_match: teacher and fake are compared by where their flows lead, not by their velocities.

Source: Mean Flow Distillation, Zhao et al. 2026, arXiv:2606.11155. From the same noised sample xt both velocities are
integrated from t to s <= t by Euler steps; V and W are the mean velocities of the two integrals. Laws whose expected
mean velocities agree on every interval are equal, and the mean over an interval varies less than the velocity at one
time. The fake is that of reverse_kl. The loss is that of matching.py with V and W for v and w:

    V = (xt - y_real(s)) / (t - s),   W = (xt - y_fake(s)) / (t - s),   g = t (V - W) / mean|x0 - (xt - t V)|

so that s = t is reverse_kl itself. Inferred here: the factor t and the denominator, which are DMD's; the authors'
published script moves xt by V - W, that is x0 by (1 - t) (V - W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import Range
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time
from flowmap.objectives.matching import descend, velocity_of
from flowmap.objectives.reverse_kl import ReverseKL


@dataclass(frozen=True)
class MeanVelocityMatch(ReverseKL):
    """The samples descend the difference of the two mean velocities.

    euler_steps: the steps of each integral, each a call of the teacher and one of the fake. Where the objective's times
    have s = t it is reverse_kl.
    """

    euler_steps: Annotated[int, Range(1, 100)] = 4
    intervals: ClassVar[bool] = True

    def __call__(self, network: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        teacher = velocity_of(teacher, "mean_velocity_match")
        fake = lambda x, t, cond: network.mean_velocity(x, t, t, cond)
        with torch.no_grad():
            mean, of_fake = self._mean(teacher.velocity, sample), self._mean(fake, sample)
        return descend(sample, mean, of_fake, normalised=self.normalised)

    def _mean(self, velocity, sample: PathSample) -> Tensor:
        """The mean of a velocity(x, t, cond) over [s, t], along its own flow from xt."""
        x, t, s, cond = sample.xt.detach(), sample.t, sample.s, sample.cond
        mean, length = torch.zeros_like(x), (t - s) / self.euler_steps
        for i in range(self.euler_steps):
            at = t - i * length
            v = velocity(x, at, cond)
            mean = mean + v / self.euler_steps
            x = x - broadcast_time(length, x) * v
        return mean
