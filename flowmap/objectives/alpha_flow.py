"""alpha-Flow: a curriculum from trajectory flow matching (alpha = 1) to MeanFlow (alpha = 0).

Source: Zhang et al. 2025, arXiv:2510.20771: its objective, restated, and the shape and constants of its schedule
(gamma 25, clamp 0.005); its full text was not at hand. Clock: 0 data, 1 noise; the paper's r is our s. With m =
t - alpha (t - s) and y = x - (t - m) v the paper regresses F(x, t, s) on alpha v + (1 - alpha) F(y, m, s), over alpha.
The gradient is that of MeanFlow's loss with a difference in place of its derivative:

    F - sg(v - (t - s) R),   R = (1 - alpha) (F(x, t, s) - F(y, m, s)) / (t - m)

R is zero at alpha = 1, where F is pulled to v on every interval, and tends to dF/dt at alpha = 0. Only there is the
exact flow map stationary, unless its paths are straight: for other alpha, y is one Euler step away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import CountFromZero, Range
from flowmap.flow.derivative import without_graph
from flowmap.flow.types import FlowMap, broadcast_time
from flowmap.objectives.meanflow import MeanFlow


@dataclass(frozen=True)
class AlphaFlow(MeanFlow):
    """MeanFlow (meanflow.py, whose settings it has) with R for its derivative, until alpha is 0.

    begin_steps, end_steps   alpha falls from 1 to 0 between these steps, as 1 - sigmoid(gamma (p - 1/2)), with p the
                             part of the way that is done
    clamp                    alpha closer than this to 0 or 1 is 0 or 1

    R costs a forward pass without graph, and nothing at alpha = 1. In bfloat16 it has a relative error of about
    0.004 / alpha: raise clamp. The paper weighs a squared error by alpha over itself; here the distance is that of the
    residual above, whatever alpha, so that the curriculum ends in MeanFlow's own loss.
    """

    begin_steps: CountFromZero = 0
    end_steps: CountFromZero = 400_000
    gamma: Annotated[float, Range(0, 1000, above=True)] = 25.0
    clamp: Annotated[float, Range(0, 0.5, below=True)] = 0.005

    def __post_init__(self):
        super().__post_init__()
        if self.begin_steps > self.end_steps:
            raise ValueError(f"begin_steps: {self.begin_steps} must be at most end_steps = {self.end_steps}")

    def alpha(self, step: int) -> float:
        """1 trains trajectory flow matching, 0 MeanFlow."""
        if not self.begin_steps <= step < self.end_steps:
            return float(step < self.begin_steps)
        done = (step - self.begin_steps) / (self.end_steps - self.begin_steps)
        alpha = 1 / (1 + math.exp(self.gamma * (done - 0.5)))
        return alpha if self.clamp <= alpha <= 1 - self.clamp else float(alpha > 0.5)

    def _needed(self, step: int) -> bool:
        return self.alpha(step) < 1

    def _derive(self, student: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond, rows: int, step: int):
        alpha = self.alpha(step)
        if alpha == 0:
            return super()._derive(student, x, t, s, v, cond, rows, step)
        return by_jumps(student, x, t, s, v, cond, torch.full_like(t[:rows], alpha))


def by_jumps(student: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond, alpha: Tensor, jumps: int = 1):
    """(F with its graph, R without one): R in the first samples, as many as alpha (n,) has, zero in the rest.

    F(y, m, s) of R is the mean velocity of so many jumps of the student, of equal length, from m to s.
    """
    rows, mean_velocity = len(alpha), student.mean_velocity(x, t, s, cond)
    if rows == 0:
        return mean_velocity, torch.zeros_like(mean_velocity, requires_grad=False)
    cond = None if cond is None else {key: value[:rows] for key, value in cond.items()}
    length, at = alpha * (t - s)[:rows], t[:rows] - alpha * (t - s)[:rows]
    y = (x[:rows] - broadcast_time(length, x[:rows]) * v[:rows]).to(x.dtype)
    stride, there = (at - s[:rows]) / jumps, torch.zeros_like(mean_velocity[:rows], requires_grad=False)
    for jump in range(jumps):
        last = jump == jumps - 1
        jumped = without_graph(student, y, at, s[:rows] if last else at - stride, cond)
        there, at = there + jumped / jumps, at - stride
        y = (y - broadcast_time(stride, y) * jumped).to(x.dtype)
    length = torch.where(length > 0, length, torch.ones_like(length))  # zero where a row stands in for none
    rate = broadcast_time((1 - alpha) / length, there) * (mean_velocity[:rows].detach() - there)
    return mean_velocity, torch.cat([rate, torch.zeros_like(mean_velocity[rows:], requires_grad=False)])
