"""Classifier guidance: change a velocity so that a classifier agrees with the samples.

Source: Dhariwal, Nichol 2021, arXiv:2105.05233, on our clock. The score is -(x + (1 - t) v) / t, so adding
w grad log p(y | x_t) to it subtracts t / (1 - t) w grad log p from the velocity. The factor is unbounded towards t = 1,
where the gradient of an exact classifier vanishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.types import Cond, Teacher, broadcast_time
from flowmap.teachers.guidance import network_calls

LogProb = Callable[[Tensor, Tensor, Cond | None], Tensor]


@dataclass(frozen=True)
class ClassifierGuided:
    """v - scale t / (1 - t) grad_x log p(y | x, t), with log_prob(x, t, cond) of shape (B,).

    log_prob gets noisy points x. With `denoised` it gets the predicted x0 = x - t v (v is constant in the gradient) and
    t = 0, so that a classifier of clean samples can be used. The factor t / (1 - t) is clamped to `most`. Both teacher
    and classifier get cond.
    """

    teacher: Teacher
    log_prob: LogProb
    scale: float = 1.0
    denoised: bool = False
    most: float = 20.0

    @property
    def network_calls(self) -> int:
        """The number of calls of the teacher's network; those of the classifier do not count."""
        return network_calls(self.teacher)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        v = self.teacher.velocity(x, t, cond)
        if self.scale == 0:
            return v
        with torch.enable_grad():
            free = x.detach().requires_grad_(True)
            seen, time = (free - broadcast_time(t, x) * v.detach(), torch.zeros_like(t)) if self.denoised else (free, t)
            (gradient,) = torch.autograd.grad(self.log_prob(seen, time, cond).sum(), free)
        factor = (t / (1 - t).clamp_min(1e-12)).clamp_max(self.most)
        return v - self.scale * broadcast_time(factor, x).to(x.dtype) * gradient
