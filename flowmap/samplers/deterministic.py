"""Deterministic few-step sampling: apply the student's own map on a falling grid of times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.flow.draws import Generator
from flowmap.flow.types import Cond, FlowMap
from flowmap.samplers.grids import FewStep, of_all


@dataclass(frozen=True)
class Deterministic(FewStep):
    """x <- f(x, t, s) from t_max to 0. On an exact map the sample is the same for any number of steps."""

    @property
    def draws(self) -> bool:
        return False

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after `steps` calls of the student. Does not use `generator`. Raises ValueError for steps
        < 1.
        """
        x = self.start(x1)
        times = [of_all(x, time) for time in self.times(steps)]
        for t, s in zip(times, times[1:], strict=False):
            x = student(x, t, s, cond)
        return x
