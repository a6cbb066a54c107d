"""Pairs of the exact flow of Gaussian data, and the velocity of their straight lines.

x0 = m + c x1, a 2-rectified flow in closed form.
"""

from __future__ import annotations

from torch import Tensor

from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from tests.support.oracle import GAUSSIAN, draw, draw_times

NET = f"{__name__}:one_sided"
MEAN, STD = GAUSSIAN.mean[0], GAUSSIAN.std


def pair(*shape: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """(x0, x1) where the exact flow from x1 ends in x0."""
    x1 = draw(*shape, seed=seed)
    return MEAN + STD * x1, x1


class StraightStudent:
    """v(x, t) = x1 - x0 with x1 = (x - (1 - t) m) / ((1 - t) c + t)."""

    def mean_velocity(self, x, t, s, cond=None):
        t = broadcast_time(t, x)
        x1 = (x - (1 - t) * MEAN) / ((1 - t) * STD + t)
        return x1 - (MEAN + STD * x1)

    def __call__(self, x, t, s, cond=None):
        return x + broadcast_time(s - t, x) * self.mean_velocity(x, t, s, cond)


class Refuses:
    """A teacher that nobody may ask."""

    def velocity(self, x, t, cond=None):
        raise AssertionError("the teacher is in the pairs")


def drawn(cond=None, seed=2):
    """Pairs of the exact flow at times of their own."""
    return Linear().sample(*pair(seed=seed), *draw_times(), cond)


def loose(seed=5):
    """Data and noise that have nothing to do with one another: every term is far from zero."""
    return Linear().sample(draw(seed=seed), draw(seed=seed + 1), *draw_times())


def one_sided(a, b):
    """A distance that is not the same from both ends, (B,)."""
    return ((a - b).square() * (1 + b.square())).flatten(1).mean(1)
