"""RCGM: recursive consistency, the base of TwinFlow: a step of the velocity, then the student's own jumps.

Sources: Cheng et al. 2025, arXiv:2512.05150 (TwinFlow), and Sun, Lin 2025, "Any-step generation via N-th order
recursive consistent velocity field estimation"; the target as TwinFlow's public code has it (Apache-2.0), as the
papers' text was not at hand. TwinFlow's self-adversarial half is the term twin of objective joint (twin.py). The weight
that its code gives to short intervals is not implemented.
Clock: 0 data, 1 noise. With m = max(t - interval, s), y = x - (t - m) v and P the displacement of `order` equal jumps
of the student from (y, m) to s:

    (t - s) F(x, t, s) = (t - m) v + P,   residual ((t - s) F - P) / (t - m) - v

That is the residual of alpha-Flow (alpha_flow.py) with alpha = (t - m) / (t - s), a step of constant length, and, for
order 1, with the same second call of the student. It tends to MeanFlow's as the interval goes to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from flowmap.base.ranges import Positive, Range
from flowmap.flow.distance import Adaptive, Distance
from flowmap.flow.types import FlowMap
from flowmap.objectives.alpha_flow import by_jumps
from flowmap.objectives.meanflow import EulerianRegression


@dataclass(frozen=True)
class RCGM(EulerianRegression):
    """distance(F, sg(F - clamp(residual))), with the guidance of MeanFlow (meanflow.py) and no derivative.

    distance    by default |.|^2 / sg(|.|^2 + 1e-6)^(1/2) of the mean square
    order       the number of the student's own jumps, each a pass without graph
    interval    the length of the step
    clamp       the residual is limited to this, entry by entry

    The paper's jumps are those of averaged weights; here the student itself jumps. Its guidance is kappa, with omega 1.
    In bfloat16 the residual has a relative error of about 0.004 (t - s) / interval: make the interval longer.
    """

    distance: Distance = Adaptive(power=0.5, offset=1e-6, mean=True)
    order: Annotated[int, Range(1, 64)] = 2
    interval: Annotated[float, Range(0, 1, above=True)] = 0.01
    clamp: Positive = 1.0

    def _derive(self, student: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond, rows: int, step: int):
        alpha = (self.interval / (t - s)[:rows]).clamp(max=1)
        return by_jumps(student, x, t, s, v, cond, alpha, self.order)

    def _limited(self, own: Tensor, target: Tensor) -> Tensor:
        return own - (own - target).clamp(-self.clamp, self.clamp)
