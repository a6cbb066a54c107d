"""The metrics that a recipe may ask for, as values, and the floor: what real samples score against real samples.

`needs` says what a metric is fed: "samples" (update(x, real=False)), "trajectory" (update(trajectory, times)) or
"endpoints" (update(few, many)). `report(metric)` gives results under the names of metrics.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.metrics.features import build_features, short_name

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.frechet import FrechetDistance
    from flowmap.metrics.precision_recall import PrecisionRecallScore
    from flowmap.metrics.trajectories import EndpointScore, StraightnessScore


class HasReference(Protocol):
    """What `floor` asks of a data set: real samples that are compared with, and others, never trained on."""

    reference: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Frechet:
    """Frechet distance of `images` generated samples to the reference (`reference_images` of it, drawn with a fixed seed; None: all)."""

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = None
    needs: ClassVar[str] = "samples"

    def build(self, reference: Tensor) -> FrechetDistance:
        """The metric with the reference (N, ...) already counted, each process a share of it."""
        from flowmap.metrics.frechet import FrechetDistance

        features = build_features(self.features, reference)
        metric = FrechetDistance(features, dims=_dims(features, reference)).to(reference.device)
        metric.update(_share(_some(reference, self.reference_images)), real=True)
        return metric

    def report(self, metric: FrechetDistance) -> dict[str, float]:
        return {f"frechet_{short_name(self.features)}": float(metric.compute())}


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall of `images` generated samples against as many of the reference, by k-th nearest neighbours."""

    features: str = "pixels"
    images: int = 2000
    k: int = 3
    needs: ClassVar[str] = "samples"

    @property
    def reference_images(self) -> int:
        return self.images

    def build(self, reference: Tensor) -> PrecisionRecallScore:
        """The metric with the reference (N, ...) already counted, each process a share of it."""
        from flowmap.metrics.precision_recall import PrecisionRecallScore

        if self.k < 1:
            raise ValueError(f"metrics.k is {self.k}; 1 or more is allowed")
        metric = PrecisionRecallScore(build_features(self.features, reference), self.k).to(reference.device)
        metric.update(_share(_some(reference, self.images)), real=True)
        return metric

    def report(self, metric: PrecisionRecallScore) -> dict[str, float]:
        return {f"{name}_{short_name(self.features)}": float(value) for name, value in metric.compute().items()}


@dataclass(frozen=True)
class Straightness:
    """How far from straight the paths of `images` samples are, over `steps` steps."""

    images: int = 256
    steps: int = 32
    needs: ClassVar[str] = "trajectory"

    def build(self) -> StraightnessScore:
        from flowmap.metrics.trajectories import StraightnessScore

        return StraightnessScore()

    def report(self, metric: StraightnessScore) -> dict[str, float]:
        return {"straightness": float(metric.compute())}


@dataclass(frozen=True)
class EndpointError:
    """How far `images` few-step end points are from those of `steps` steps from the same noise."""

    images: int = 256
    steps: int = 32
    needs: ClassVar[str] = "endpoints"

    def build(self) -> EndpointScore:
        from flowmap.metrics.trajectories import EndpointScore

        return EndpointScore()

    def report(self, metric: EndpointScore) -> dict[str, float]:
        return {"endpoint_error": float(metric.compute())}


METRICS = {"frechet": Frechet, "precision_recall": PrecisionRecall, "straightness": Straightness, "endpoint_error": EndpointError}


def floor(spec: Frechet | PrecisionRecall, dataset: HasReference, *, splits: int = 5) -> dict[str, float]:
    """What real samples score against real samples, under the names of `spec.report`, at the sizes at which generated ones are measured.

    With as many held-out samples as `spec.images`: that many of them against the reference, as generated ones would be.
    With fewer (digits): all real samples are cut into halves, `splits` times, and the mean is taken. A Frechet distance between halves
    of h is brought to the sizes of use, n of the reference and m generated, by its bias law: times (1/n + 1/m) / (2/h). Precision and
    recall have no such law and stay as measured on halves. A sampler that repeats the reference can score below the floor.
    """
    if len(dataset.held_out) >= spec.images:
        return _between(spec, dataset.reference, _some(dataset.held_out, spec.images))
    real = torch.cat([dataset.reference, dataset.held_out])
    half, found = len(real) // 2, []
    for seed in range(splits):
        mixed = _some(real, None, seed=seed)
        found.append(_between(spec, mixed[:half], mixed[half : 2 * half]))
    mean = {key: sum(one[key] for one in found) / splits for key in found[0]}
    if not isinstance(spec, Frechet):
        return mean
    used = len(_some(dataset.reference, spec.reference_images))
    measured = min(half, spec.reference_images or half)
    factor = (1 / used + 1 / spec.images) / (1 / measured + 1 / half)
    return {key: value * factor for key, value in mean.items()}


def _between(spec: Frechet | PrecisionRecall, reference: Tensor, samples: Tensor) -> dict[str, float]:
    metric = spec.build(reference)
    metric.update(_share(samples), real=False)
    return spec.report(metric)


def _some(x: Tensor, count: int | None, *, seed: int = 0) -> Tensor:
    """`count` rows of x (None or too many: all), in an order that depends on seed alone."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[order.to(x.device)]


def _share(x: Tensor) -> Tensor:
    """This process's rows of what every process holds: metrics add up over processes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return x[torch.distributed.get_rank() :: torch.distributed.get_world_size()] if ready else x


def _dims(features, reference: Tensor) -> int:
    with torch.no_grad():
        found = features(reference[:2])
    if found.ndim != 2 or len(found) != 2:
        raise ValueError(f"features must map (B, ...) to (B, D); for B = 2 they gave {tuple(found.shape)}")
    return found.shape[1]
