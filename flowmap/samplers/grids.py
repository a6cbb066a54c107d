"""Time grids of few-step samplers: falling times from t_max to exactly 0, one more than the calls of the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Positive, Range, Rho, Share, check_ranges
from flowmap.flow.draws import Generator
from flowmap.flow.parts import BaseSampler
from flowmap.flow.solver import rho_times, uniform_times
from flowmap.flow.types import Cond, FlowMap

GRIDS = ("uniform", "shifted", "rho")


@dataclass(frozen=True)
class FewStep(BaseSampler):
    """The settings that every few-step sampler has.

    steps     the step counts that evaluation reports; a call may use any other
    grid      "uniform" is even in t; "shifted" moves uniform times u to shift u / (1 + (shift - 1) u), towards noise
              for shift > 1; "rho" is even in sigma^(1/rho) between t_max and sigma_min, then 0 (EDM)
    t_max     where sampling starts, with the state t_max x1; below 1 it leaves out the data's share (1 - t_max) x0, as
              EDM does
    middle    falling times between t_max and 0, which replace the grid for calls of len(middle) + 1 steps
    """

    steps: tuple[Calls, ...] = (1, 2, 4)
    grid: str = "uniform"
    shift: Positive = 1.0
    rho: Rho = 7.0
    sigma_min: Positive = 0.002
    t_max: Annotated[float, Range(0, 1, above=True)] = 1.0
    middle: tuple[Share, ...] = ()

    def __post_init__(self):
        check_ranges(self)
        if not self.steps:
            raise ValueError(f"steps is {self.steps!r}; allowed: whole numbers from 1, at least one")
        if self.grid not in GRIDS:
            raise ValueError(f"grid is {self.grid!r}; allowed: {', '.join(GRIDS)}")
        ends = (self.t_max, *self.middle, 0.0)
        if not all(t > s for t, s in zip(ends, ends[1:], strict=False)):
            raise ValueError(
                f"middle is {self.middle!r}; allowed: falling times strictly between t_max = {self.t_max!r} and 0"
            )

    def times(self, steps: int) -> tuple[float, ...]:
        """The steps + 1 times of a run, falling from exactly t_max to exactly 0. Raises ValueError for steps < 1."""
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; allowed: a whole number from 1")
        if self.middle and steps == len(self.middle) + 1:
            return (self.t_max, *self.middle, 0.0)
        if self.grid == "rho":
            return (self.t_max, *self._rho_times(steps)[1:])
        even = uniform_times(steps)
        if self.grid == "shifted":
            even = tuple(self.shift * u / (1 + (self.shift - 1) * u) for u in even)
        return (self.t_max, *(self.t_max * u for u in even[1:-1]), 0.0)

    def _rho_times(self, steps: int) -> tuple[float, ...]:
        """EDM's grid. Its sigma_max is that of t_max, at most 80."""
        sigma_max = min(self.t_max / max(1 - self.t_max, 1e-9), 80.0)
        return rho_times(steps, rho=self.rho, sigma_min=min(self.sigma_min, sigma_max), sigma_max=sigma_max)

    def calls(self, steps: int) -> int:
        """The number of calls of the student for a sample of that many steps."""
        return steps

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        raise NotImplementedError

    def step(self, student, x: Tensor, t: float, s: float, cond) -> Tensor:
        """The state x at time t carried to time s in one step."""
        return jump(student, x, t, s, cond)

    def start(self, x1: Tensor) -> Tensor:
        """The state at t_max."""
        return x1 if self.t_max == 1 else self.t_max * x1


def jump(student, x: Tensor, t: float, s: float, cond) -> Tensor:
    """f(x, t, s) for one pair of times for the whole batch."""
    return student(x, of_all(x, t), of_all(x, s), cond)


def of_all(x: Tensor, time: float) -> Tensor:
    """The time of all samples of x, (B,) in float32, float64 for a float64 x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), time, device=x.device, dtype=dtype)
