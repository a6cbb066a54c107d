"""Points of a known density: a ring of equal Gaussians. Its exact teacher is `MixtureTeacher(means, std, weights)`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import Range, Seed
from flowmap.data.dataset import Dataset, Source


@dataclass(frozen=True)
class Toy(Source):
    """`num_modes` Gaussians N(m_k, std^2 I) of equal weight, m_k evenly on a circle. The label of a point is its
    Gaussian.

    One mode with radius 0 is a centred Gaussian. `points` are drawn for training and a fifth as many are held out, both
    by `seed`.
    """

    num_modes: Annotated[int, Range(1, 10_000)] = 8
    radius: Annotated[float, Range(0, 1000)] = 1.0
    std: Annotated[float, Range(0, 1000, above=True)] = 0.1
    points: Annotated[int, Range(10, 100_000_000)] = 50_000
    seed: Seed = 0

    @property
    def means(self) -> Tensor:
        """(num_modes, 2) float64."""
        angle = torch.arange(self.num_modes, dtype=torch.float64) * (2 * math.pi / self.num_modes)
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    @property
    def weights(self) -> Tensor:
        """(num_modes,) float64, sums to 1."""
        return torch.full((self.num_modes,), 1 / self.num_modes, dtype=torch.float64)

    def build(self) -> Dataset:
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(self.num_modes, (self.points + self.points // 5,), generator=generator)
        noise = torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
        samples = (self.means[labels] + self.std * noise).float()
        kept, out = slice(self.points), slice(self.points, None)
        return Dataset("toy", samples[kept], samples[out], labels[kept], labels[out], num_classes=self.num_modes)
