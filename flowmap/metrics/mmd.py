"""The maximum mean discrepancy between real and generated samples in a feature space, by a Gaussian kernel.

Source: Gretton et al. 2012 (the unbiased estimate). With CLIP's embeddings it is CMMD, Jayasumana et al. 2024,
arXiv:2401.09603.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowmap.metrics.real import Features, features_in


class MaximumMeanDiscrepancy(Metric):
    """1000 times mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k = exp(-d^2 / (2 sigma^2)).

    Pairs of a sample with itself are left out of the first two means. The expectation is 0 if both are of one law, so
    that a figure may be below 0. `reset` forgets the generated samples and keeps the real ones. Keeps all features, in
    float64: 8 (N + M) D bytes for N real and M generated samples, and 2048 max(N, M) for rows of the kernel matrix.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True
    real: list[Tensor]
    fake: list[Tensor]
    chunk = 256  # rows of the kernel matrix at once

    def __init__(self, features: Features, sigma: float, unit: bool = False):
        super().__init__()
        self.features, self.sigma, self.unit = features, sigma, unit
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def scaled(self, found: Tensor) -> Tensor:
        """Features as the kernel compares them, float64."""
        return F.normalize(found.double(), dim=1) if self.unit else found.double()

    @torch.no_grad()
    def update(self, x: Tensor | None, real: bool, found: Tensor | None = None) -> None:
        """Count x; found (B, D): its features, if they are known, in which case x may be None."""
        kept = self.real if real else self.fake
        kept.extend(self.scaled(part) for part in features_in(self.features, x, found))

    def compute(self) -> Tensor:
        """A float64 scalar. Raises ValueError for fewer than two samples of a kind."""
        real, fake = (dim_zero_cat(held) if len(held) else torch.empty(0) for held in (self.real, self.fake))
        for kind, held in (("real", real), ("generated", fake)):
            if len(held) < 2:
                raise ValueError(f"an MMD needs 2 or more {kind} samples, got {len(held)}")
        return 1000 * (self._within(real) + self._within(fake) - 2 * self._sum(real, fake) / (len(real) * len(fake)))

    def reset(self) -> None:
        kept = list(self.real)
        super().reset()
        self.real = kept

    def _within(self, x: Tensor) -> Tensor:
        return (self._sum(x, x) - len(x)) / (len(x) * (len(x) - 1))

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"
        parts = [
            torch.cdist(part, y, compute_mode=exact).square_().div_(-2 * self.sigma**2).exp_().sum()
            for part in x.split(self.chunk)
        ]
        return torch.stack(parts).sum()


def median_distance(x: Tensor) -> float:
    """The median distance between two different rows of x (N, D), at least 1e-12."""
    return max(float(torch.nn.functional.pdist(x).median()), 1e-12)
