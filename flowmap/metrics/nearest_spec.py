"""Distances to the nearest training sample, as a value that a recipe may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowmap.base.schema import added
from flowmap.metrics.against import HasReferences
from flowmap.metrics.real import CHUNK, Device
from flowmap.metrics.sample_specs import OnSamples
from flowmap.metrics.spec import MAX_SAMPLES, Classes, InFeatures, Sizes, within

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.nearest import Neighbours


@dataclass(frozen=True)
class NearestNeighbour(InFeatures, OnSamples):
    """Distances in `features` from `images` generated samples to the nearest of `reference_images` training samples.

    None: all training samples. nearest_<features> is the median, nearest_<features>_held_out that of as many held-out
    samples, nearest_<features>_ratio the first over the second: about 1 for new samples of the same law, below 1 for
    copies.
    """

    features: str = "pixels"
    images: int = 1000
    reference_images: int | None = None
    weights: str | None = added(None)

    def __post_init__(self):
        super().__post_init__()
        within(self, reference_images=(1, MAX_SAMPLES))

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        super().fits(data, conditional=conditional, paired=paired)
        if not data.num_held_out:
            raise ValueError("metrics: nearest_neighbour compares with held-out samples, and data.held_out is 0")

    def held_bytes(self, width: int, training: int, held_out: int) -> float:
        real = min(training, self.reference_images or training)
        return 8.0 * (width * (real + CHUNK + min(held_out, self.images)) + real * CHUNK)

    def compare(self, data: HasReferences, device: Device = "cpu") -> Neighbours:
        """The metric with the training samples already in the feature space."""
        from flowmap.metrics.nearest import Neighbours

        return Neighbours(
            data,
            features=self.features,
            images=self.images,
            reference_images=self.reference_images,
            weights=self.weights,
            device=device,
        )

    def baseline(self, metric: Neighbours, data: HasReferences, classes: Classes | None = None) -> dict[str, float]:
        return metric.baseline()
