"""The distance of generated samples to the nearest training sample, and that of held-out samples: copies are nearer.

A model that has learned the law and no single sample would draw samples like the held-out ones. A model that blurs is
far from every sample: read the ratio together with a distance between laws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowmap.metrics.against import CHUNK, HasReferences
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.spec import some


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
    ):
        reference = data.reference
        network = build_features(features, reference, weights)
        self.features, self.images = features, images
        self.metric = NearestScore(network, some(reference, reference_images)).to(reference.device)
        self.held_out = float(self.metric.distances_of(some(data.held_out, images)).median())

    def reset(self) -> None:
        self.metric.reset()

    def update(self, x: Tensor, *, world: int = 1) -> None:
        self.metric.update(x[: self.images // world])

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
    """The median over samples of the distance to the nearest of `real` (N, ...) in a feature space. Keeps all features.

    features maps (B, ...) to (B, D).
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, features: Callable[[Tensor], Tensor], real: Tensor):
        super().__init__()
        self.features = features
        self.register_buffer("real", torch.cat([self._seen(part) for part in real.split(CHUNK)]))
        self.add_state("distances", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def distances_of(self, x: Tensor) -> Tensor:
        """(B,) float64."""
        return torch.cat([torch.cdist(self._seen(part), self.real).amin(1) for part in x.split(CHUNK)])

    @torch.no_grad()
    def _seen(self, x: Tensor) -> Tensor:
        return self.features(x).double()

    def update(self, x: Tensor) -> None:
        if len(x):
            self.distances.append(self.distances_of(x))

    def compute(self) -> Tensor:
        """A float64 scalar. Raises ValueError if no sample was given."""
        if not len(self.distances):
            raise ValueError("metrics: nearest_neighbour was given no sample")
        return dim_zero_cat(self.distances).median()
