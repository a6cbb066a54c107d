"""Align Your Flow: continuous-time distillation of a teacher's velocity into a flow map.

Source: Sabour, Fidler, Kreis 2025, arXiv:2506.14603 (EMD: theorem 3.2, algorithm 1; LMD: the Lagrangian counterpart).
Clock: 0 data, 1 noise. At the exact map, with d/dt taken along the teacher's velocity v:

    EMD   F(x, t, s) = v(x, t) - (t - s) dF/dt                         (moving the departure changes no arrival)
    LMD   F(x, t, s) = v(f, s) + (t - s) dF/ds,   f = x + (s - t) F    (the arrival moves with the teacher's velocity)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flowmap.base.ranges import Share
from flowmap.base.schema import added
from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative, without_graph
from flowmap.flow.distance import gradient_as_target, normalise
from flowmap.flow.host import on_device
from flowmap.flow.shares import anywhere, called_on, evenly, taken
from flowmap.flow.tangent.compiled import uncompiled
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time, rows_of
from flowmap.objectives.tangent import Tangent
from flowmap.objectives.uncertainty import EvenWeight, TimeWeight


@dataclass(frozen=True)
class _AYF(Tangent):
    """The loss of both: the part by which r_max is below 1 is a flow-matching term.

    weight: of the normalised error by its times (uncertainty.py); none is the paper's.
    """

    weight: TimeWeight = added(EvenWeight())

    @property
    def learns_weight(self) -> bool:
        return self.weight.learned

    def _compiling(self, r: float) -> AbstractContextManager:
        """The context of the student's call: a warm-up's first step, without derivative, is not worth a graph."""
        return uncompiled() if r == 0 < self.r_max else nullcontext()

    def _loss(self, student: FlowMap, sample: PathSample, mean_velocity: Tensor, g: Tensor, rate: Tensor, step: int):
        size = g.flatten(1).norm(dim=1)
        error = gradient_as_target(mean_velocity, normalise(g, c=self.c, norm=self.norm))
        loss = self.weight(error, student, sample.t, sample.s)
        weight = torch.tensor(self.tangent_weight(step))
        logs = {"residual_norm": size, "tangent_norm": rate.flatten(1).norm(dim=1), "tangent_weight": weight}
        return Loss(loss.mean(), {key: value.detach() for key, value in logs.items()})


@dataclass(frozen=True)
class AYFEMD(_AYF):
    """|| F - sg(F - g) ||^2 with g = (F - v) + r (t - s) dF/dt, normalised per sample.

    Without a teacher v is the conditional velocity. On the diagonal t = s the derivative is multiplied by zero and is
    not computed.
    """

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
        r = self.tangent_weight(step)
        derive = lambda x, t, s, v, cond, rows: eulerian_derivative(
            student, x, t, s, v, cond, mode=self.derivative, rows=rows
        )
        with self._compiling(r):
            mean_velocity, rate = off_diagonal(derive, student, sample, v, needed=r > 0)
        g = (mean_velocity.detach() - v) + r * broadcast_time(t - s, x) * rate
        return self._loss(student, sample, mean_velocity, g, rate, step)


@dataclass(frozen=True)
class AYFLMD(_AYF):
    """|| F - sg(F - g) ||^2 with g = F - (v(f, s) + r (t - s) dF/ds), normalised; f is where the student arrives."""

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        if teacher is None:
            raise ValueError("objective.kind: ayf_lmd evaluates the teacher where the student arrives; add a teacher")
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        r = self.tangent_weight(step)
        derive = lambda x, t, s, v, cond, rows: lagrangian_derivative(
            student, x, t, s, cond, mode=self.derivative, rows=rows
        )
        with self._compiling(r):
            mean_velocity, rate = off_diagonal(derive, student, sample, sample.vt, needed=r > 0)
        arrival = x + broadcast_time(s - t, x) * mean_velocity.detach()
        g = mean_velocity.detach() - (teacher.velocity(arrival, s, cond) + r * broadcast_time(t - s, x) * rate)
        return self._loss(student, sample, mean_velocity, g, rate, step)


@dataclass(frozen=True)
class AYFMixed(_AYF):
    """AYF-LMD on a share `lagrangian` of the rows, AYF-EMD on the others; the mean over all rows.

    own_lagrangian and own_eulerian: the share of either kind's rows that depart from the student's own state f(x1, 1,
    t) instead of the path between noise and data. That state is computed without gradient and costs one more forward
    pass for those rows. Both identities hold wherever the teacher's velocity does, and these are the states that the
    student meets when it samples. Shares are spread evenly over the samples of the run, however they are batched
    (flow/shares.py).
    """

    lagrangian: Share = 0.25
    own_lagrangian: Share = 0.0
    own_eulerian: Share = 0.0

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        if teacher is None:
            self._check_without_teacher()
        settings = {field.name: getattr(self, field.name) for field in fields(_AYF)}
        chosen, own = self.rows(sample.places(step))
        sample = at_own_states(student, sample, own)
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        for rows, kind in ((~chosen, AYFEMD), (chosen, AYFLMD)):
            if (called := called_on(rows, student, sample.t.device)) is not None:
                loss = kind(**settings)(student, teacher, rows_of(sample, called), step)
                losses.append(loss.value * (int(rows.sum()) / len(rows)))
                logs = {
                    **loss.logs,
                    **{key: logs.get(key, torch.zeros_like(sample.t)) for key in ("residual_norm", "tangent_norm")},
                }
                for key in ("residual_norm", "tangent_norm"):
                    logs[key] = logs[key].to(loss.logs[key].dtype)
                    if called.real:
                        logs[key][called.places] = loss.logs[key]
        total = sum(losses)
        assert isinstance(total, Tensor)  # a batch has rows
        return Loss(total, logs)

    def _check_without_teacher(self) -> None:
        """Raise ValueError where some rows need the teacher's velocity away from the path."""
        for name, share, where in (
            ("own_eulerian", self.own_eulerian, "at the student's own states"),
            ("lagrangian", self.lagrangian, "where the student arrives"),
        ):
            if share:
                needed = f"{share} needs a teacher, evaluated {where}"
                raise ValueError(f"objective.{name}: {needed}; without one it must be 0")

    def rows(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return two masks (n,) of the samples at those places of the run: Lagrangian rows, and rows at the student's
        own states; on the device of `place`.
        """
        chosen, lagrangian = evenly(place, self.lagrangian, turned=1), taken(place, self.lagrangian, turned=1)
        own, own_eulerian = (
            evenly(lagrangian, self.own_lagrangian, turned=2),
            evenly(place - lagrangian, self.own_eulerian, turned=3),
        )
        return chosen, torch.where(chosen, own, own_eulerian)


def at_own_states(student: FlowMap, sample: PathSample, rows: Tensor) -> PathSample:
    """The sample with xt replaced, in the rows of a mask, by the student's own state f(x1, 1, t), without gradient.

    At t = 1 that is the noise itself.
    """
    if (called := called_on(rows, student, sample.t.device)) is None:
        return sample
    part = rows_of(sample, called)
    jump = without_graph(student, part.x1, torch.ones_like(part.t), part.t, part.cond)
    moved = (part.x1 + broadcast_time(part.t - 1, part.x1) * jump).to(sample.xt.dtype)
    return replace(sample, xt=sample.xt.index_copy(0, called.places, moved)) if called.real else sample


def off_diagonal(derive, student: FlowMap, sample: PathSample, v: Tensor, *, needed: bool) -> tuple[Tensor, Tensor]:
    """Return (F, rate) of the whole batch; the rate is computed where t > s and zero elsewhere, as it is multiplied by
    t - s.

    There is one forward pass whatever the times: rows on the diagonal are moved to the end of the batch, and back.
    """
    still = ~sample.moving if needed else torch.ones(len(sample.t), dtype=torch.bool)
    rows = max(int((~still).sum()), int(needed and anywhere(~still, student)))
    given = (sample.xt, sample.t, sample.s, v)
    if not bool(still[:rows].any()):
        return derive(*given, sample.cond, rows)
    on_host = torch.argsort(still, stable=True)
    back = torch.argsort(on_host)
    order, place = (on_device(index, sample.t.device) for index in (on_host, back))
    cond = None if sample.cond is None else {key: value[order] for key, value in sample.cond.items()}
    mean_velocity, rate = derive(*(value[order] for value in given), cond, rows)
    return mean_velocity[place], rate[place]
