"""References for tests: exact teachers, an exact student, draws without two equal dimensions, slopes of errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.types import broadcast_time
from flowmap.teachers.exact import GaussianTeacher, MixtureTeacher

SHAPE = (5, 3, 4, 6)
"""Batch, channels, height, width."""

GAUSSIAN = GaussianTeacher(mean=(0.7,), std=0.4, shape=SHAPE[1:])
RING = MixtureTeacher(
    means=tuple((math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)),
    std=(0.1,),
    weights=(1, 2, 1, 1, 3, 1, 1, 2),
)


@dataclass(frozen=True)
class ExactStudent:
    """The flow map of an exact teacher, with its mean velocity multiplied by `scale` (1 is the truth)."""

    teacher: GaussianTeacher | MixtureTeacher = GAUSSIAN
    scale: float = 1.0

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        if hasattr(self.teacher, "mean_velocity"):
            return self.scale * self.teacher.mean_velocity(x, t, s, cond)
        jump = broadcast_time(torch.where(s == t, torch.ones_like(t), s - t), x)
        chord = (self.teacher.flow_map(x, t, s, cond) - x) / jump
        return self.scale * torch.where(broadcast_time(s == t, x), self.teacher.velocity(x, t, cond), chord)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        return x + broadcast_time(s - t, x) * self.mean_velocity(x, t, s, cond)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal draws; the shape is SHAPE where none is given."""
    return torch.randn(*(shape or SHAPE), generator=seeded(seed), dtype=dtype)


def draw_times(n: int = SHAPE[0], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """n pairs (t, s) with 0 < s < t < 1."""
    pair = torch.rand(2, n, generator=seeded(seed), dtype=dtype)
    return pair.amax(0), pair.amin(0)


def slope(sizes, errors) -> float:
    """The least-squares slope of log error against log size: the order of convergence when sizes are step sizes."""
    x, y = (torch.log(torch.as_tensor(values, dtype=torch.float64)) for values in (sizes, errors))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
