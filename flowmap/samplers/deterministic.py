"""Deterministic few-step sampling: the student's own map, applied along a falling grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.flow.draws import Generator
from flowmap.flow.types import Cond, FlowMap
from flowmap.samplers.grids import FewStep, jump


@dataclass(frozen=True)
class Deterministic(FewStep):
    """x <- f(x, t, s) from t_max to 0. The same noise gives the same sample; on an exact map any number of steps gives the same one."""

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after `steps` calls of the student. generator is not used. Raises ValueError for steps < 1."""
        times = self.times(steps)
        x = self.start(x1)
        for t, s in zip(times, times[1:], strict=False):
            x = jump(student, x, t, s, cond)
        return x
