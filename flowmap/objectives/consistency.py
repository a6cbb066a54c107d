"""Discrete consistency models: two neighbouring points of one trajectory end at the same data.

Source: Song, Dhariwal, Chen, Sutskever 2023, arXiv:2303.01469; distillation with a teacher, training without one.
Clock: 0 data, 1 noise. The paper's sigma is t / (1 - t); its smallest sigma is 0 here, where f(x, 0, 0) = x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Positive, Rho, check_ranges
from flowmap.flow.derivative import without_graph
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time

GRIDS = ("uniform", "rho")


@dataclass(frozen=True)
class Consistency(BaseObjective):
    """distance(f(x, t, 0), sg f(y, u, 0)), with y the result of one solver step of the teacher's velocity from t to u.

    steps       the number of grid steps between noise and data; u is one grid step below t, for any t
    grid        "uniform" in t, or "rho", even in sigma^(1/rho) between sigma_min and sigma_max; the last step of "rho"
                goes from sigma_min or below to 0
    solver      "heun" or "euler"; without a teacher the velocity is the conditional one, which both follow exactly

    The target is computed by the student itself, which later work found better than the paper's averaged weights. The
    sample's arrival time is not used.
    """

    steps: Calls = 18
    grid: str = "rho"
    rho: Rho = 7.0
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    solver: str = "heun"
    distance: Distance = Squared()

    def __post_init__(self):
        check_ranges(self)
        if self.grid not in GRIDS:
            raise ValueError(f"grid: {self.grid!r} is not one of {', '.join(GRIDS)}")
        if self.solver not in ("heun", "euler"):
            raise ValueError(f"solver: {self.solver!r} is not one of heun, euler")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min} must be below sigma_max = {self.sigma_max}")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, cond = sample.xt, sample.t, sample.cond
        u, zero = self.earlier(t), torch.zeros_like(t)
        y = x + broadcast_time(u - t, x) * self._slope(teacher, sample, u)
        prediction = x - broadcast_time(t, x) * student.mean_velocity(x, t, zero, cond)
        y = y.to(x.dtype)
        target = y - broadcast_time(u, x) * without_graph(student, y, u, zero, cond)
        error = self.distance(prediction, target.detach())
        return Loss(error.mean(), {"error": error.detach()})

    def _slope(self, teacher: Teacher | None, sample: PathSample, u: Tensor) -> Tensor:
        """The solver's mean velocity from t to u, shaped like x."""
        x, t, cond = sample.xt, sample.t, sample.cond
        if teacher is None:
            return sample.vt
        first = teacher.velocity(x, t, cond)
        if self.solver == "euler":
            return first
        return (first + teacher.velocity((x + broadcast_time(u - t, x) * first).to(x.dtype), u, cond)) / 2

    def earlier(self, t: Tensor) -> Tensor:
        """u, one grid step nearer to data than t, (B,); 0 where there is none."""
        if self.grid == "uniform":
            return (t - 1 / self.steps).clamp_min(0)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = (t / (1 - t)).clamp_max(self.sigma_max)
        root = sigma ** (1 / self.rho) - (high - low) / max(self.steps - 1, 1)
        moved = root.clamp_min(0) ** self.rho
        return torch.where((root >= low * (1 - 1e-5)) & (t > 0), moved / (1 + moved), torch.zeros_like(t))
