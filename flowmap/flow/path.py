"""Paths xt = a(t) x0 + b(t) x1 from data (t = 0) to noise (t = 1), and conversions between kinds of predictions.

A kind of prediction is a pair (p, q) and means p x0 + q x1. Together with the state a x0 + b x1 that gives two
equations in x0 and x1, so one formula converts any kind to any other wherever the result is determined.

    kind              p x0 + q x1                       used by x0                x0
    denoisers epsilon           x1                                DDPM velocity          a' x0 + b' x1 = d xt / dt
    flows on this path linear_velocity   x1 - x0                           flowmap: the velocity on the linear clock v
    a x1 - b x0                       variance-preserving v-prediction (Salimans, Ho 2022, arXiv:2202.00512) score
    -x1 / b                           score models trig              cos x1 - sin x0 / sigma_data      TrigFlow's F
    (sCM, arXiv:2410.11081), tan = b / (a sigma_data)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.ranges import InsideOne, Positive, check_ranges
from flowmap.flow.types import Cond, PathSample, broadcast_time

PREDICTIONS = ("x0", "epsilon", "velocity", "linear_velocity", "v", "score", "trig")


@dataclass(frozen=True)
class Coefficients:
    """The state a x0 + b x1, and da/dt and db/dt, which tabulated schedules do not have. Each is (B,) or 0-dim."""

    a: Tensor
    b: Tensor
    a_rate: Tensor | None = None
    b_rate: Tensor | None = None


def wide(t: Tensor | float) -> Tensor:
    """t as a tensor in float32 or better (a number in float64)."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def convert(value: Tensor, x: Tensor, at: Coefficients, *, source: str, target: str, sigma_data: float = 1.0) -> Tensor:
    """Convert a prediction `value` at the state x = a x0 + b x1 from kind `source` to kind `target`.

    value and x are (B, ...); the result has x's dtype, and coefficients are computed in float32 or better. The result
    is inf or nan only where it is undetermined: at b = 0 from "x0" to kinds that need x1, at a = 0 from "epsilon" or
    "score" to kinds that need x0, and "score" at b = 0. sigma_data is used by "trig" only. Raises a ValueError for a
    kind not in PREDICTIONS, or "velocity" without rates.
    """
    for name, kind in (("source", source), ("target", target)):
        if kind not in PREDICTIONS:
            raise ValueError(f"{name} is {kind!r}; allowed: {', '.join(PREDICTIONS)}")
    if source == target:
        return value
    b = broadcast_time(at.b, x)
    if source == "score":
        return convert(-b * value, x, at, source="epsilon", target=target, sigma_data=sigma_data).to(x.dtype)
    if target == "score":
        epsilon = convert(value, x, at, source=source, target="epsilon", sigma_data=sigma_data)
        return (-epsilon / b).to(x.dtype)
    p, q = _row(source, at, sigma_data)
    p_new, q_new = _row(target, at, sigma_data)
    determinant = at.a * q - at.b * p
    on_x = (p_new * q - q_new * p) / determinant
    on_value = (at.a * q_new - at.b * p_new) / determinant
    return (broadcast_time(on_x, x) * x + broadcast_time(on_value, x) * value).to(x.dtype)


def to_linear(x: Tensor, at: Coefficients) -> tuple[Tensor, Tensor]:
    """The state a x0 + b x1 on the linear path: (x / (a + b), t = b / (a + b))."""
    total = at.a + at.b
    return (x / broadcast_time(total, x)).to(x.dtype), at.b / total


def _row(kind: str, at: Coefficients, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(p, q) such that the prediction is p x0 + q x1; the caller has converted "score" to "epsilon"."""
    a, b = at.a, at.b
    if kind == "velocity":
        if at.a_rate is None or at.b_rate is None:
            needs = "kind 'velocity' needs the rates da/dt and db/dt"
            raise ValueError(f"{needs}, which a tabulated schedule does not have; use 'linear_velocity'")
        return at.a_rate, at.b_rate
    if kind == "trig":
        radius = torch.hypot(a * sigma_data, b)
        return -b / (sigma_data * radius), a * sigma_data / radius
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return {"x0": (one, zero), "epsilon": (zero, one), "linear_velocity": (-one, one), "v": (-b, a)}[kind]


class _Path:
    """Base of all paths; a subclass defines coefficients(t) and from_linear_time(t)."""

    def coefficients(self, t: Tensor | float) -> Coefficients:
        raise NotImplementedError

    def from_linear_time(self, t: Tensor | float) -> Tensor:
        raise NotImplementedError

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> PathSample:
        """The point xt = a x0 + b x1 and its velocity vt = a' x0 + b' x1, in x0's dtype; t and s in float32 or better.

        x0 and x1 are (B, ...) of one shape, t and s (B,). Raises ValueError otherwise.
        """
        if x0.shape != x1.shape:
            raise ValueError(f"x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
        t, s = wide(t), wide(s)
        for name, time in (("t", t), ("s", s)):
            if time.shape != x0.shape[:1]:
                raise ValueError(f"{name} must be ({x0.shape[0]},), got {tuple(time.shape)}")
        at = self.coefficients(t)
        assert at.a_rate is not None and at.b_rate is not None  # only tabulated schedules have none
        xt = broadcast_time(at.a, x0) * x0 + broadcast_time(at.b, x0) * x1
        vt = broadcast_time(at.a_rate, x0) * x0 + broadcast_time(at.b_rate, x0) * x1
        return PathSample(x0=x0, x1=x1, t=t, s=s, xt=xt.to(x0.dtype), vt=vt.to(x0.dtype), cond=cond)

    def convert(
        self, value: Tensor, xt: Tensor, t: Tensor | float, *, source: str, target: str, sigma_data: float = 1.0
    ) -> Tensor:
        """A prediction at (xt, t) on this path, converted from kind `source` to kind `target`: see convert above."""
        return convert(value, xt, self.coefficients(t), source=source, target=target, sigma_data=sigma_data)

    def to_linear(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The state (x, t) of this path as (x, t) on the linear path, with the same x0 and x1."""
        return to_linear(x, self.coefficients(t))

    def from_linear(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The state (x, t) of the linear path as (x, t) on this path: the inverse of to_linear."""
        own = self.from_linear_time(t)
        at = self.coefficients(own)
        return (broadcast_time(at.a + at.b, x) * x).to(x.dtype), own


@dataclass(frozen=True)
class Linear(_Path):
    """xt = (1 - t) x0 + t x1: rectified flow, flow matching, and flowmap's own clock."""

    def coefficients(self, t: Tensor | float) -> Coefficients:
        t = wide(t)
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def from_linear_time(self, t: Tensor | float) -> Tensor:
        return wide(t)


@dataclass(frozen=True)
class Trig(_Path):
    """xt = cos(pi t / 2) x0 + sigma_data sin(pi t / 2) x1: TrigFlow (arXiv:2410.11081), angle in units of pi / 2.

    If sigma_data is the data's std, the state has that std at every t; sigma_data = 1 is the cosine schedule.
    """

    sigma_data: Positive = 1.0

    def __post_init__(self):
        check_ranges(self)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        t = wide(t)
        # cos(angle) as sin of the complement, so that both ends are exact
        a, b = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
        return Coefficients(a, self.sigma_data * b, -math.pi / 2 * b, math.pi / 2 * self.sigma_data * a)

    def from_linear_time(self, t: Tensor | float) -> Tensor:
        t = wide(t)
        return torch.atan2(t, (1 - t) * self.sigma_data) * (2 / math.pi)


@dataclass(frozen=True)
class VariancePreserving(_Path):
    """The VP SDE: xt = a x0 + sqrt(1 - a^2) x1 with log a = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.

    Source: Song et al. 2021, arXiv:2011.13456. db/dt is infinite at t = 0, so rates below t_min are those at t_min.
    a(1) is not 0 (0.0066 with the defaults): from_linear_time maps linear times above to_linear's largest (0.9935) to
    1.
    """

    beta_min: Positive = 0.1
    beta_max: Positive = 20.0
    t_min: InsideOne = 1e-5

    def __post_init__(self):
        check_ranges(self)
        if not self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min: {self.beta_min!r} must be at most beta_max = {self.beta_max!r}")

    def _log_a(self, t: Tensor) -> Tensor:
        return -t * t * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def coefficients(self, t: Tensor | float) -> Coefficients:
        t = wide(t)
        log_a, late = self._log_a(t), t.clamp_min(self.t_min)
        log_late = self._log_a(late)
        a_rate = -torch.exp(log_late) * (self.beta_min + late * (self.beta_max - self.beta_min)) / 2
        b_rate = -torch.exp(log_late) * a_rate / torch.sqrt(-torch.expm1(2 * log_late))
        return Coefficients(torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a)), a_rate, b_rate)

    def from_linear_time(self, t: Tensor | float) -> Tensor:
        t = wide(t)
        minus_log_a = torch.log1p((t / (1 - t)) ** 2) / 2
        slope = self.beta_max - self.beta_min
        own = 4 * minus_log_a / (self.beta_min + torch.sqrt(self.beta_min**2 + 4 * slope * minus_log_a))
        return torch.where(t < 1, own, torch.ones_like(t)).clamp(0, 1)


PATHS = {"linear": Linear, "trig": Trig, "variance_preserving": VariancePreserving}
