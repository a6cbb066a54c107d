"""The distance of generated samples to the nearest training sample, and that of held-out samples: copies are nearer.

A model that has learned the law and no single sample would draw samples like the held-out ones. A model that blurs is
far from every sample: read the ratio together with a distance between laws.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowmap.metrics.against import HasReferences
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.real import CHUNK, Device, Features, Real, chunk_of, some


class Neighbours:
    """The metric of kind nearest_neighbour on a data set; `reset`, `update` and `report` are as those of Against."""

    def __init__(
        self,
        data: HasReferences,
        *,
        features: str,
        images: int,
        reference_images: int | None,
        weights: str | None = None,
        device: Device = "cpu",
    ):
        reference, held_out = Real(data.reference, device), Real(data.held_out, device)
        network = build_features(features, data.reference, device, weights=weights)
        self.features, self.images, self.device, self._counted = features, images, device, 0
        real = reference.all_features(network, some(len(reference), reference_images))
        self.metric = NearestScore(network, real).to(device)
        found = held_out.all_features(network, some(len(held_out), images))
        self.held_out = float(self.metric.distances_of(found).median())

    def reset(self) -> None:
        self.metric.reset()
        self._counted = 0

    def update(self, x: Tensor, *, world: int = 1) -> None:
        """Count this process's next generated samples x (B, ...), up to its share of `images`."""
        x = x[: max(0, self.images // world - self._counted)]
        for part in x.split(chunk_of(x.shape[1:])):
            self.metric.update(part.to(self.device))
        self._counted += len(x)

    def report(self) -> dict[str, float]:
        return self._row(float(self.metric.compute()))

    def baseline(self) -> dict[str, float]:
        """The row of the held-out samples themselves."""
        return self._row(self.held_out)

    def _row(self, median: float) -> dict[str, float]:
        key = f"nearest_{short_name(self.features)}"
        ratio = median / self.held_out if self.held_out else float("inf") if median else 1.0
        return {key: median, f"{key}_held_out": self.held_out, f"{key}_ratio": ratio}


class NearestScore(Metric):
    """The median over samples of the distance to the nearest of N real ones in a feature space.

    features maps (B, ...) to (B, D). real: the real samples' features (N, D), which are kept in float64, 8 N D bytes;
    of each generated sample its distance is kept.
    """

    is_differentiable = False
    full_state_update = False
    real: Tensor

    def __init__(self, features: Features, real: Tensor):
        super().__init__()
        self.features = features
        self.register_buffer("real", real.double())
        self.add_state("distances", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def distances_of(self, found: Tensor) -> Tensor:
        """(B,) float64, of the features (B, D)."""
        return torch.cat([torch.cdist(part.double(), self.real).amin(1) for part in found.split(CHUNK)])

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        if len(x):
            self.distances.append(self.distances_of(self.features(x)))

    def compute(self) -> Tensor:
        """A float64 scalar. Raises ValueError if no sample was given."""
        if not len(self.distances):
            raise ValueError("metrics: nearest_neighbour was given no sample")
        return dim_zero_cat(self.distances).median()
