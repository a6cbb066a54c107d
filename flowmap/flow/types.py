"""The shared types: path samples, losses, and the protocols of teachers, students, paths, priors and so on.

Clock, everywhere: t = 0 is data, t = 1 is noise; t is the departure, s the arrival, 0 <= s <= t <= 1.
Letters: x0 data, x1 noise, xt the point at t, vt the conditional velocity d xt / dt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmap.flow.draws import Generator

Cond = Mapping[str, Tensor]
"""Conditions by name, one row per sample: "class" (B,) int64 with -1 for no class, "guidance" (B,) float, "text" ..."""


@dataclass(frozen=True)
class PathSample:
    """All randomness of a training step, drawn before an objective sees it.

    x0, x1, xt, vt are (B, ...); t and s are (B,) with 0 <= s <= t <= 1, in float32 or better. variance: that of the
    entries of x1 given the code of a learned prior, (B, ...); None means 1. place: the index of each sample in the run,
    (B,) int64; None outside a run.
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    s: Tensor
    xt: Tensor
    vt: Tensor
    cond: Cond | None = None
    variance: Tensor | None = None
    place: Tensor | None = None

    def places(self, step: int) -> Tensor:
        """`place`; without one, the indices in a run with one batch of this size per step."""
        if self.place is not None:
            return self.place
        return step * len(self.t) + torch.arange(len(self.t), device=self.t.device)


def rows_of(sample: PathSample, rows: Tensor) -> PathSample:
    """The sample restricted to `rows`, an index or a mask."""
    cond = None if sample.cond is None else {key: value[rows] for key, value in sample.cond.items()}
    parts = {name: getattr(sample, name)[rows] for name in ("x0", "x1", "t", "s", "xt", "vt")}
    more: dict[str, Any] = {
        name: None if (value := getattr(sample, name)) is None else value[rows] for name in ("variance", "place")
    }
    return PathSample(**parts, cond=cond, **more)


@dataclass(frozen=True)
class Loss:
    """The value to minimise, and quantities to log.

    value is a scalar with a graph. logs are detached: a scalar is logged as train/<key>; a (B,) vector is also logged
    by bins of t.
    """

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """A frozen velocity field v(x, t) = E[x1 - x0 | xt = x] on our clock; it never needs gradients."""

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor: ...


class FlowMap(Protocol):
    """A student: f(x, t, s) = x + (s - t) F(x, t, s), with F the mean velocity over [s, t]."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor: ...

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor: ...


class Path(Protocol):
    """An interpolation of data and noise: xt = a(t) x0 + b(t) x1."""

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> PathSample: ...


class Prior(Protocol):
    """The distribution of x1, shaped like x0; a learned prior may depend on x0 and cond."""

    def sample(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Tensor: ...


class TimeSampler(Protocol):
    """Draws n pairs (t, s), each (n,) float32 on `device`, 0 <= s <= t <= 1."""

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...


class Objective(Protocol):
    """A deterministic function of student, teacher and a drawn sample; `step` is the optimiser step (for warm-ups).

    diagonal: whether it trains a plain velocity, only at t = s, so that the student needs no arrival time.
    """

    @property
    def diagonal(self) -> bool: ...

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss: ...


class Sampler(Protocol):
    """Maps x1 to data in a few calls of the student."""

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor: ...


def broadcast_time(t: Tensor | float, x: Tensor) -> Tensor:
    """t reshaped to broadcast against x: (B,) becomes (B, 1, ..., 1); a number becomes a 0-dim tensor.

    The dtype of t does not change, so times stay in float32 or better. Raises a ValueError unless t is a scalar or
    (B,).
    """
    t = torch.as_tensor(t, device=x.device)
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"times must be ({x.shape[0]},) for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))
