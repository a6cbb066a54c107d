"""Self-distilled flow maps: F(x, t, t) learns the velocity on the diagonal; off it, the student is consistent with
itself.

Source: Boffi, Albergo, Vanden-Eijnden 2025, arXiv:2505.18825. Clock: 0 data, 1 noise; the paper's clock is reversed,
and its v_{s,t} is F. Diagonal samples (times.diagonal; 3 in 4 in the paper) descend F - v, with v conditional or the
teacher's. For the others, with u = F(x, t, t):

    ESD   F(x, t, s) = u(x, t) - (t - s) dF/dt                          Eulerian, d/dt along u
    LSD   F(x, t, s) = u(f, s) + (t - s) dF/ds,   f = x + (s - t) F     Lagrangian
    PSD   F(x, t, s) = h F(x, t, m) + (1 - h) F(f(x, t, m), m, s),   m = t - h (t - s)     progressive, the semigroup
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.derivative import (
    derivative_named,
    eulerian_derivative,
    lagrangian_derivative,
    value_and_graded_rate,
    value_and_rate,
    without_graph,
)
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.host import chosen_rows, on_device
from flowmap.flow.parts import BaseObjective
from flowmap.flow.shares import called_on
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time, rows_of
from flowmap.objectives.uncertainty import EvenWeight, TimeWeight

SPLITS = ("midpoint", "uniform")


@dataclass(frozen=True)
class SelfDistilled(BaseObjective):
    """The settings of all three.

    distance: of both kinds of sample, by default the paper's sum of squares. weight: {kind: learned} is the paper's, by
    (t, s).
    """

    distance: Distance = Squared(mean=False)
    weight: TimeWeight = EvenWeight()

    @property
    def learns_weight(self) -> bool:
        return self.weight.learned

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        moving = sample.moving
        error = sample.t.new_zeros(len(moving))
        sides = lambda part: self._sides(student, part, step)
        for rows, of_rows in ((~moving, lambda part: _velocities(student, teacher, part)), (moving, sides)):
            if (called := called_on(rows, student, sample.t.device)) is not None:
                found = self.distance(*of_rows(rows_of(sample, called))).to(error.dtype)
                error = error.index_add(0, called.places, found * float(called.real))
        logs = {"error": error, "diagonal_error": _mean(error, ~moving), "self_error": _mean(error, moving)}
        return Loss(
            self.weight(error, student, sample.t, sample.s).mean(), {key: value.detach() for key, value in logs.items()}
        )

    def _sides(self, student: FlowMap, sample: PathSample, step: int) -> tuple[Tensor, Tensor]:
        """Return, for samples with t > s, the prediction, which carries grad, and its target; both shaped like x."""
        raise NotImplementedError


def _velocities(student: FlowMap, teacher: Teacher | None, sample: PathSample) -> tuple[Tensor, Tensor]:
    """F on the diagonal, and its target."""
    target = sample.vt if teacher is None else teacher.velocity(sample.xt, sample.t, sample.cond)
    return student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond), target.detach()


def _mean(error: Tensor, rows: Tensor) -> Tensor:
    chosen = chosen_rows(rows, error.device)
    return error[chosen.places].mean() if len(chosen.host) else error.new_zeros(())


@dataclass(frozen=True)
class _ByRate(SelfDistilled):
    """The settings of losses with a derivative.

    through_rate: whether the gradient also passes through the student's time derivative, as in the paper (by
    torch.func.jvp with a graph: about twice the activations); otherwise the rate is part of the target. derivative: how
    a rate without a graph is computed, "dual", "forward" or "difference".
    """

    through_rate: bool = True
    derivative: str = "dual"

    def __post_init__(self):
        object.__setattr__(self, "derivative", derivative_named(self.derivative))


@dataclass(frozen=True)
class ESD(_ByRate):
    """|| F + (t - s) dF/dt - sg(u) ||^2. As in the paper's runs, no gradient passes through the spatial derivative."""

    def _sides(self, student: FlowMap, sample: PathSample, step: int) -> tuple[Tensor, Tensor]:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        length = broadcast_time(t - s, x)
        own = without_graph(student, x, t, t, cond)
        if not self.through_rate:
            mean_velocity, rate = eulerian_derivative(student, x, t, s, own, cond, mode=self.derivative)
            return mean_velocity + length * rate, own
        of_time = lambda t: student.mean_velocity(x, t, s, cond)
        mean_velocity, rate = value_and_graded_rate(of_time, (t,), (torch.ones_like(t),))
        of_space = lambda x: student.mean_velocity(x, t, s, cond)
        with torch.no_grad():
            _, space_rate = value_and_rate(of_space, (x,), (own,), mode=self.derivative)
        return mean_velocity + length * (rate + space_rate), own


@dataclass(frozen=True)
class LSD(_ByRate):
    """|| F - (t - s) dF/ds - sg(u(f, s)) ||^2, with the velocity evaluated where the student arrives.

    With half of the samples on the diagonal, at the arrival, it is terminal velocity matching (arXiv:2511.19797), up to
    that paper's target by averaged weights.
    """

    def _sides(self, student: FlowMap, sample: PathSample, step: int) -> tuple[Tensor, Tensor]:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        length = broadcast_time(t - s, x)
        if self.through_rate:
            of_arrival = lambda s: student.mean_velocity(x, t, s, cond)
            mean_velocity, rate = value_and_graded_rate(of_arrival, (s,), (torch.ones_like(s),))
        else:
            mean_velocity, rate = lagrangian_derivative(student, x, t, s, cond, mode=self.derivative)
        arrival = (x - length * mean_velocity.detach()).to(x.dtype)
        own = without_graph(student, arrival, s, s, cond)
        return mean_velocity - length * rate, own


@dataclass(frozen=True)
class PSD(SelfDistilled):
    """|| F - sg(h F(x, t, m) + (1 - h) F(f(x, t, m), m, s)) ||^2: one jump equals two.

    split: "midpoint", h = 1/2, or "uniform", h evenly in [0, 1) over the samples of the run (a Weyl sequence, as an
    objective draws nothing).
    """

    split: str = "midpoint"

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split: {self.split!r} is not one of {', '.join(SPLITS)}")

    def _sides(self, student: FlowMap, sample: PathSample, step: int) -> tuple[Tensor, Tensor]:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        mean_velocity = student.mean_velocity(x, t, s, cond)
        h = spread(sample.places(step), t) if self.split == "uniform" else torch.full_like(t, 0.5)
        middle = t - h * (t - s)
        first = without_graph(student, x, t, middle, cond)
        between = (x + broadcast_time(middle - t, x) * first).to(x.dtype)
        second = without_graph(student, between, middle, s, cond)
        return mean_velocity, broadcast_time(h, x) * first + broadcast_time(1 - h, x) * second


def spread(place: Tensor, like: Tensor) -> Tensor:
    """A number in [0, 1) for each place, (n,) int64, in the dtype of `like`, on its device: multiples of the golden
    ratio.

    Any stretch of consecutive places has its numbers evenly spread.
    """
    return on_device(((place.double() * 0.6180339887498949 + 0.5) % 1).to(like.dtype), like.device)
