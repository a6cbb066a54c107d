"""Gamma-sampling: jump beyond the next time, then add fresh noise, so that every step keeps the marginal.

Source: consistency trajectory models (Kim et al. 2024, arXiv:2310.02279), as used in Align Your Flow
(arXiv:2506.14603).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flowmap.base.ranges import Share
from flowmap.flow.draws import Generator, normal_like
from flowmap.flow.types import Cond, FlowMap, RecipeView
from flowmap.samplers.grids import FewStep, jump


@dataclass(frozen=True)
class Gamma(FewStep):
    """x_s = (1-s)/(1-s~) f(x, t, s~) + gamma s eps, with sigma~ = sqrt(1 - gamma^2) sigma_s and sigma = t / (1 - t).

    gamma = 0 is Deterministic to the bit; gamma = 1 is the multi-step sampling of consistency models (to 0 and back).
    The last step adds no noise. On an exact map x_s has the path's own law at s for every gamma.
    """

    gamma: Share = 0.5

    @property
    def jumps_to_data(self) -> bool:
        return self.gamma == 1

    @property
    def draws(self) -> bool:
        return self.gamma > 0

    def check(self, recipe: RecipeView) -> None:
        if recipe.prior.learned:
            raise ValueError("sampler: gamma adds noise from N(0, I), and the prior is a learned one; choose another")

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after `steps` calls of the student; `generator` draws the noise. Raises ValueError for
        steps < 1.
        """
        times = self.times(steps)
        kept = math.sqrt(1 - self.gamma**2)
        x = self.start(x1)
        for t, s in zip(times, times[1:], strict=False):
            # (1-s)/(1-s~) = 1 - s + kept s, and s~ is kept s over that: finite at s = 1, exactly (1, s) for gamma = 0
            ratio = 1 - (1 - kept) * s
            x = ratio * jump(student, x, t, kept * s / ratio, cond)
            if s > 0 and self.gamma > 0:
                x = x + self.gamma * s * normal_like(x, generator)
        return x
