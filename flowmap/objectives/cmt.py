"""Consistency mid-training: initialise a flow map by regression on points of the teacher's own solver trajectories.

Source: Hu, Lai, Mitsufuji, Ermon 2025, arXiv:2509.24526 (known from its abstract and reviews; its weights and distances
are settings here). Clock: 0 data, 1 noise. With x_0 = x1, x_1, ... x_K the states of a solver at falling times from 1
to 0, for i < j:

    F(x_i, t_i, t_j) = (x_i - x_j) / (t_i - t_j)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowmap.base.ranges import Count, check_ranges
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.host import on_device
from flowmap.flow.parts import BaseObjective
from flowmap.flow.solver import Heun, NoiseAnchored, Solver
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time


@dataclass(frozen=True)
class CMT(BaseObjective):
    """distance(F(x_i, t_i, t_j), (x_i - x_j) / (t_i - t_j)), with i and j the solver's steps nearest to the sample's t
    and s.

    i and j differ by one step at least. Each trajectory starts from the sample's noise and serves `points` consecutive
    rows, which share the condition of the first; no trajectory is stored. The sample's data is not used.
    """

    solver: Solver = field(default_factory=lambda: Heun(steps=16))
    points: Count = 8
    distance: Distance = Squared()

    def __post_init__(self):
        check_ranges(self)
        if isinstance(self.solver, NoiseAnchored):
            why = "its states are not points of one trajectory"
            raise ValueError(f"solver: the anchored rule does not fit: {why}; choose euler, midpoint, heun or rk4")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        if teacher is None:
            raise ValueError("objective.kind: cmt follows the teacher's own trajectories; add a teacher")
        leader = torch.arange(len(sample.t), device=sample.t.device) // self.points
        trajectory, cond = self._trajectories(teacher, sample, -(-len(sample.t) // self.points))
        times = on_device(torch.tensor(self.solver.times(), dtype=sample.t.dtype), sample.t.device)
        i, j = places(times, sample.t, sample.s)
        cond = None if cond is None else {key: value[leader] for key, value in cond.items()}
        x, y, t, s = trajectory[i, leader], trajectory[j, leader], times[i], times[j]
        target = (x - y) / broadcast_time(t - s, x).to(x.dtype)
        error = self.distance(student.mean_velocity(x, t, s, cond), target)
        return Loss(error.mean(), {"error": error.detach()})

    @torch.no_grad()
    def _trajectories(self, teacher: Teacher, sample: PathSample, count: int):
        """The states at every time of the grid, (K + 1, count, ...), and their conditions.

        Trajectories start from every `points`-th row of the sample's noise.
        """
        rows = torch.arange(count, device=sample.t.device) * self.points
        cond = None if sample.cond is None else {key: value[rows] for key, value in sample.cond.items()}
        return self.solver(lambda x, t: teacher.velocity(x, t, cond), sample.x1[rows], keep=True).trajectory, cond


def places(times: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The indices (i, j) of the entries of the falling `times` (K + 1,) nearest to t and s, with i < K and j > i."""
    nearest = lambda at: (at[:, None] - times[None, :]).abs().argmin(1)
    i = nearest(t).clamp_max(len(times) - 2)
    return i, torch.maximum(nearest(s), i + 1)
