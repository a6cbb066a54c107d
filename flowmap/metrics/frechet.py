"""The Frechet distance between real and generated samples, as Gaussians in a feature space.

Source: Heusel et al. 2017, arXiv:1706.08500: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
It is biased upwards by about C (1/n + 1/m) for n and m samples (Chong, Forsyth 2020, arXiv:1911.07023): compare figures
of equal sizes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flowmap.metrics.real import Features, features_in
from flowmap.metrics.statistics import Statistics


class FrechetDistance(Metric):
    """Running float64 means and covariances of the features of real and generated samples, and their distance.

    `reset` forgets the generated samples and keeps the real ones (`reset_real` forgets those), so that a reference
    passes through the features once. Holds moments, no features: 32 (D^2 + D) bytes. Sums over processes are taken in
    `compute`. given: mean and covariance of the real samples, which then need not be counted; every process has them.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True
    given_mean: Tensor | None
    given_covariance: Tensor | None

    def __init__(self, features: Features, dims: int, given: Statistics | None = None):
        super().__init__(dist_sync_fn=summed)
        self.features, self.dims = features, dims
        self.register_buffer("given_mean", None if given is None else given.mean)
        self.register_buffer("given_covariance", None if given is None else given.covariance)
        for kind in ("real", "fake"):
            self.add_state(f"{kind}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_sum", torch.zeros(dims, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", torch.zeros(dims, dims, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, x: Tensor | None, real: bool, found: Tensor | None = None) -> None:
        """Count x; found (B, dims): its features, if they are known, in which case x may be None."""
        kind = "real" if real else "fake"
        for part in features_in(self.features, x, found):
            part = part.double()
            for name, value in {"count": len(part), "sum": part.sum(0), "outer": part.T @ part}.items():
                setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises ValueError for fewer than two samples; warns if a covariance must be singular.
        """
        return gaussian_frechet(*self._moments("real"), *self._moments("fake"))

    def reset(self) -> None:
        kept = {name: getattr(self, name) for name in ("real_count", "real_sum", "real_outer")}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)

    def reset_real(self) -> None:
        for name in ("real_count", "real_sum", "real_outer"):
            setattr(self, name, torch.zeros_like(getattr(self, name)))
        self._computed = None  # torchmetrics' cache of the last result

    def _moments(self, kind: str) -> tuple[Tensor, Tensor]:
        if kind == "real" and self.given_mean is not None and self.given_covariance is not None:
            return self.given_mean, self.given_covariance
        n = getattr(self, f"{kind}_count")
        if n < 2:
            raise ValueError(f"a Frechet distance needs 2 or more {kind} samples, got {int(n)}")
        if n <= self.dims:
            warnings.warn(
                f"{int(n)} {kind} samples for {self.dims} features: the Frechet distance is far too high", stacklevel=3
            )
        mean = getattr(self, f"{kind}_sum") / n
        return mean, (getattr(self, f"{kind}_outer") - n * mean.outer(mean)) / (n - 1)


def summed(value: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of a state over all processes, as the one entry of what torchmetrics adds up.

    Its default gathers the states of all processes before it adds them, which takes as many times the memory.
    """
    total = value.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


def gaussian_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """The squared 2-Wasserstein distance between N(mean1, cov1) and N(mean2, cov2); NaN if one is not finite.

    means (D,), covariances (D, D), which may be singular. tr (S1^(1/2) S2 S1^(1/2))^(1/2) is the sum of the singular
    values of S1^(1/2) S2^(1/2), which loses no digits by squaring.
    """
    if not all(bool(moment.isfinite().all()) for moment in (mean1, cov1, mean2, cov2)):
        return mean1.new_tensor(float("nan"))
    shared = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
