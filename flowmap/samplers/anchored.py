"""The sampler of 2-rectified flow++: predict the data, then return on the straight line to the noise of the start.

Source: Lee, Lin, Fanti 2024, arXiv:2405.20320. flow/solver.py has the same rule for any velocity (NoiseAnchored).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.flow.draws import Generator
from flowmap.flow.types import Cond, FlowMap
from flowmap.samplers.grids import FewStep, of_all


@dataclass(frozen=True)
class Anchored(FewStep):
    """x0_hat = x - t v(x, t), then x = (1 - s) x0_hat + s x1, with v = F(x, t, t) and x1 the noise of the start.

    It equals Euler where paths are straight, and is better than Euler at few steps where they are nearly straight. It
    is for students trained on the diagonal.
    """

    @property
    def draws(self) -> bool:
        return False

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after `steps` calls of the student. Does not use `generator`. Raises ValueError for steps
        < 1.
        """
        times = self.times(steps)
        x = self.start(x1)
        for t, s in zip(times, times[1:], strict=False):
            time = of_all(x, t)
            guess = x - t * student.mean_velocity(x, time, time, cond)
            x = (1 - s) * guess + s * x1
        return x
