"""Pairs of the exact flow of Gaussian data, and the velocity of their straight lines: x0 = m + c x1, a 2-rectified flow in closed form."""

from __future__ import annotations

from torch import Tensor

from flowmap.flow.types import along
from tests.oracle import GAUSSIAN, draw

MEAN, STD = GAUSSIAN.mean[0], GAUSSIAN.std


def pair(*shape: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """(x0, x1) where the exact flow from x1 ends in x0."""
    x1 = draw(*shape, seed=seed)
    return MEAN + STD * x1, x1


class StraightStudent:
    """v(x, t) = x1 - x0 with x1 = (x - (1 - t) m) / ((1 - t) c + t)."""

    def mean_velocity(self, x, t, s, cond=None):
        t = along(t, x)
        x1 = (x - (1 - t) * MEAN) / ((1 - t) * STD + t)
        return x1 - (MEAN + STD * x1)

    def __call__(self, x, t, s, cond=None):
        return x + along(s - t, x) * self.mean_velocity(x, t, s, cond)
