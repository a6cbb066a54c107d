"""Solvers of dx/dt = v(x, t), from noise to data or from data to noise, that count the network's calls.

A velocity is any callable (x (B, ...), t (B,)) -> (B, ...). A solver records a graph unless it is called under no_grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Positive, Rho, check_ranges

Velocity = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float], Tensor]
GRIDS = ("uniform", "rho")


@dataclass(frozen=True)
class Solution:
    """The final x, the states at every time (N + 1, B, ...) if they were kept, and the number of velocity calls."""

    x: Tensor
    trajectory: Tensor | None
    calls: int


def uniform_times(steps: int, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """steps + 1 equally spaced times, from exactly `start` to exactly `end`."""
    _check_steps(steps)
    return (start, *(start + (end - start) * i / steps for i in range(1, steps)), end)


def rho_times(steps: int, *, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[float, ...]:
    """EDM's grid on our clock: sigma from sigma_max to sigma_min, even in sigma^(1/rho), then 0.

    t is sigma / (1 + sigma), so it starts at sigma_max / (1 + sigma_max), below 1. Source: Karras et al. 2022,
    arXiv:2206.00364, eq. 5.
    """
    _check_steps(steps)
    if not (rho > 0 and 0 < sigma_min <= sigma_max):
        allowed = "above 0, sigma_min <= sigma_max"
        raise ValueError(f"rho, sigma_min, sigma_max are {rho!r}, {sigma_min!r}, {sigma_max!r}; allowed: {allowed}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [(high + (low - high) * i / max(steps - 1, 1)) ** rho for i in range(steps)]
    return (*(sigma / (1 + sigma) for sigma in sigmas), 0.0)


def integrate(
    velocity: Velocity, x: Tensor, times: Sequence[float] | Tensor, *, step: Step, keep: bool = False
) -> Solution:
    """Integrate the velocity from x over `times`, which must be strictly decreasing or strictly increasing.

    The state is kept in float32 or better; the velocity gets x in its own dtype and times (B,) in float32 (float64
    for a float64 x). Raises a ValueError for fewer than two times, or times that are not monotonic.
    """
    times = [float(t) for t in times]
    forward = all(t < s for t, s in zip(times, times[1:], strict=False))
    if len(times) < 2 or not (forward or all(t > s for t, s in zip(times, times[1:], strict=False))):
        raise ValueError(f"times is {times!r}; allowed: two or more, strictly falling or strictly rising")
    at = _Counted(velocity, x)
    state = x if x.dtype == torch.float64 else x.float()
    states = [state]
    for t, s in zip(times, times[1:], strict=False):
        state = step(at, state, t, s)
        if keep:
            states.append(state)
    trajectory = torch.stack(states).to(x.dtype) if keep else None
    return Solution(state.to(x.dtype), trajectory, at.calls)


class _Counted:
    """A velocity that takes one number t for the whole batch and counts its calls."""

    def __init__(self, velocity: Velocity, x: Tensor):
        self.velocity, self.calls, self.dtype = velocity, 0, x.dtype
        self.times = x.new_ones(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.calls += 1
        return self.velocity(x.to(self.dtype), self.times * t)


def euler_step(v, x: Tensor, t: float, s: float) -> Tensor:
    """One call, order 1."""
    return x + (s - t) * v(x, t)


def midpoint_step(v, x: Tensor, t: float, s: float) -> Tensor:
    """Two calls, order 2."""
    half = x + (s - t) / 2 * v(x, t)
    return x + (s - t) * v(half, (s + t) / 2)


def heun_step(v, x: Tensor, t: float, s: float) -> Tensor:
    """Two calls, order 2: the mean of the velocities at both ends."""
    first = v(x, t)
    return x + (s - t) / 2 * (first + v(x + (s - t) * first, s))


def rk4_step(v, x: Tensor, t: float, s: float) -> Tensor:
    """Four calls, order 4."""
    h, middle = s - t, (s + t) / 2
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, middle)
    k3 = v(x + h / 2 * k2, middle)
    k4 = v(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@dataclass(frozen=True)
class Solver:
    """Base of all solvers: the number of steps and the time grid.

    grid "uniform" is even in t. grid "rho" is EDM's, with its first time moved from sigma_max / (1 + sigma_max) to
    exactly 1, where x is pure noise; it is defined between 1 and 0 only.
    """

    steps: Calls = 50
    grid: str = "uniform"
    rho: Rho = 7.0
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    def __post_init__(self):
        check_ranges(self)
        if self.grid not in GRIDS:
            raise ValueError(f"grid is {self.grid!r}; allowed: {', '.join(GRIDS)}")
        if not self.sigma_min <= self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min!r} must be at most sigma_max = {self.sigma_max!r}")

    def times(self, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
        """The steps + 1 times from `start` to `end`."""
        if self.grid == "uniform":
            return uniform_times(self.steps, start, end)
        if {start, end} != {0.0, 1.0}:
            raise ValueError(f"start, end are {start!r}, {end!r}; allowed with grid 'rho': 1 to 0, or 0 to 1")
        falling = rho_times(self.steps, rho=self.rho, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        falling = (1.0, *falling[1:])
        return falling if start == 1 else falling[::-1]

    def step(self, v, x: Tensor, t: float, s: float) -> Tensor:
        raise NotImplementedError

    def __call__(
        self, velocity: Velocity, x: Tensor, *, start: float = 1.0, end: float = 0.0, keep: bool = False
    ) -> Solution:
        """Integrate from x (B, ...) at time `start` to time `end`; start < end maps data to noise."""
        return integrate(velocity, x, self.times(start, end), step=self.step, keep=keep)


@dataclass(frozen=True)
class Euler(Solver):
    """Order 1, one call per step. On EDM's grid it is DDIM."""

    def step(self, v, x: Tensor, t: float, s: float) -> Tensor:
        return euler_step(v, x, t, s)


@dataclass(frozen=True)
class Midpoint(Solver):
    """Order 2, two calls per step, none of them at the end of the step."""

    def step(self, v, x: Tensor, t: float, s: float) -> Tensor:
        return midpoint_step(v, x, t, s)


@dataclass(frozen=True)
class Heun(Solver):
    """Order 2, two calls per step. With euler_last the step to t = 0 is an Euler step, as in EDM: 2 steps - 1 calls."""

    euler_last: bool = False

    def step(self, v, x: Tensor, t: float, s: float) -> Tensor:
        return euler_step(v, x, t, s) if self.euler_last and s == 0 else heun_step(v, x, t, s)


@dataclass(frozen=True)
class RK4(Solver):
    """Order 4, four calls per step."""

    def step(self, v, x: Tensor, t: float, s: float) -> Tensor:
        return rk4_step(v, x, t, s)


@dataclass(frozen=True)
class NoiseAnchored(Solver):
    """The sampler of 2-rectified flow++ (arXiv:2405.20320): x0_hat = x - t v, then x = (1 - s) x0_hat + s x1.

    x1 is the initial noise. The result equals Euler's for straight paths, and for any paths with 1 or 2 steps down to
    0. One call per step; from t = 1 towards 0 only.
    """

    def __call__(
        self, velocity: Velocity, x: Tensor, *, start: float = 1.0, end: float = 0.0, keep: bool = False
    ) -> Solution:
        if start != 1 or not 0 <= end < 1:
            allowed = "allowed for the anchored rule: start 1, end in [0, 1)"
            raise ValueError(f"start, end are {start!r}, {end!r}; {allowed}")
        noise = x if x.dtype == torch.float64 else x.float()

        def step(v, x, t, s):
            return (1 - s) * (x - t * v(x, t)) + s * noise

        return integrate(velocity, x, self.times(start, end), step=step, keep=keep)


def invert(velocity: Velocity, x0: Tensor, solver: Solver) -> Solution:
    """The noise x1 that the velocity maps to x0, both (B, ...): the solver integrates from t = 0 to t = 1."""
    return solver(velocity, x0, start=0.0, end=1.0)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; allowed: a whole number from 1")


SOLVERS = {"euler": Euler, "heun": Heun, "rk4": RK4, "midpoint": Midpoint, "anchored": NoiseAnchored}
