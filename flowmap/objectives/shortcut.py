"""Shortcut models: one jump equals two jumps of half its length, for lengths that are powers of two.

Source: Frans, Hafner, Levine, Abbeel 2024, arXiv:2410.12557. Clock: 0 data, 1 noise; the paper's clock is reversed. The
lengths come from the recipe's times: `dyadic`, with its diagonal samples for flow matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import Range, check_ranges
from flowmap.flow.derivative import without_graph
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.types import FlowMap, PathSample, broadcast_time
from flowmap.objectives.self_distilled import SelfDistilled


@dataclass(frozen=True)
class Shortcut(SelfDistilled):
    """distance(F, sg(half of F(x, t, m) + F(f(x, t, m), m, s))) with m halfway; on the diagonal distance(F, v).

    v is the conditional velocity or the teacher's. finest: half jumps of 1 / finest or shorter are Euler steps of the
    velocity F(., t, t), at the end of the paper's ladder of lengths; 0 for none. The paper's target comes from averaged
    weights and its guidance from a doubled batch; here the target comes from the student itself and the guidance from
    the teacher.
    """

    distance: Distance = Squared()
    finest: Annotated[int, Range(0, 2**20)] = 128

    def __post_init__(self):
        check_ranges(self)

    def _sides(self, student: FlowMap, sample: PathSample, step: int) -> tuple[Tensor, Tensor]:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        mean_velocity = student.mean_velocity(x, t, s, cond)
        middle = (t + s) / 2
        shortest = (t - s) / 2 * self.finest <= 1 + 1e-6 if self.finest else torch.zeros_like(t, dtype=torch.bool)
        first = without_graph(student, x, t, torch.where(shortest, t, middle), cond)
        between = (x + broadcast_time(middle - t, x) * first).to(x.dtype)
        second = without_graph(student, between, middle, torch.where(shortest, middle, s), cond)
        return mean_velocity, (first + second) / 2
