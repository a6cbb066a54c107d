"""Sampling by a solver of the student's velocity F(x, t, t) on a falling grid, for students that are velocities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.flow.draws import Generator
from flowmap.flow.solver import euler_step, heun_step, integrate, midpoint_step, rk4_step
from flowmap.flow.types import Cond, FlowMap
from flowmap.samplers.grids import FewStep

STEPS = {"euler": (euler_step, 1), "midpoint": (midpoint_step, 2), "heun": (heun_step, 2), "rk4": (rk4_step, 4)}


@dataclass(frozen=True)
class Solve(FewStep):
    """dx/dt = F(x, t, t) by euler (1 call a step, order 1), midpoint (2, 2), heun (2, 2) or rk4 (4, 4)."""

    solver: str = "midpoint"

    def __post_init__(self):
        super().__post_init__()
        if self.solver not in STEPS:
            raise ValueError(f"solver: {self.solver!r} is not one of {', '.join(STEPS)}")

    @property
    def draws(self) -> bool:
        return False

    def calls(self, steps: int) -> int:
        return steps * STEPS[self.solver][1]

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after calls(steps) calls of the student. Does not use `generator`. Raises ValueError for
        steps < 1.
        """
        return self._integrated(student, self.start(x1), self.times(steps), cond)

    def step(self, student, x: Tensor, t: float, s: float, cond) -> Tensor:
        return self._integrated(student, x, (t, s), cond)

    def _integrated(self, student, x: Tensor, times: tuple[float, ...], cond) -> Tensor:
        return integrate(lambda x, t: student.mean_velocity(x, t, t, cond), x, times, step=STEPS[self.solver][0]).x
