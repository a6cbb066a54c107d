"""The metrics that a recipe may ask for, as values.

`needs` says what a metric is fed: "samples" (update(x, real=False)), "conditions" (update(x, cond)), "trajectory" (update(trajectory, times)),
"endpoints" (update(few, many)), "inversion" (update(x0, x1, back)) or "loss" (update(place, velocity, vt)). `report(metric)` gives results
under the names of metrics.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowmap.flow.solver import Heun, NoiseAnchored, Solver
from flowmap.flow.types import Cond
from flowmap.metrics.features import build_features, check_features, short_name

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.agreement import CaptionRetrieval, ClassAgreement
    from flowmap.metrics.frechet import FrechetDistance
    from flowmap.metrics.held_out import InversionScore, LossByTimeScore
    from flowmap.metrics.mmd import MaximumMeanDiscrepancy
    from flowmap.metrics.precision_recall import PrecisionRecallScore
    from flowmap.metrics.trajectories import EndpointScore, StraightnessScore


class _InFeatures:
    """A metric that looks at samples in the space `features`."""

    def check(self) -> None:
        """ValueError where that space cannot be had on this machine; no network is loaded."""
        check_features(self.features)


@dataclass(frozen=True)
class Frechet(_InFeatures):
    """Frechet distance of `images` generated samples to the reference (`reference_images` of it, drawn with a fixed seed; None: all)."""

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = None
    needs: ClassVar[str] = "samples"

    def compared(self, reference: int) -> int:
        """How many generated samples are compared with `reference` real ones."""
        return self.images

    def build(self, reference: Tensor, like: FrechetDistance | None = None) -> FrechetDistance:
        """The metric with the reference (N, ...) already counted, each process a share of it.

        like: one whose feature space it uses; without it the space is fitted to the reference.
        """
        from flowmap.metrics.frechet import FrechetDistance

        features = build_features(self.features, reference) if like is None else like.features
        metric = FrechetDistance(features, dims=_dims(features, reference)).to(reference.device)
        metric.update(share(some(reference, self.reference_images)), real=True)
        return metric

    def report(self, metric: FrechetDistance) -> dict[str, float]:
        return {f"frechet_{short_name(self.features)}": float(metric.compute())}


@dataclass(frozen=True)
class PrecisionRecall(_InFeatures):
    """Precision and recall of `images` generated samples against as many of the reference, by k-th nearest neighbours.

    Where fewer are held out, as many generated samples are compared with them.
    """

    features: str = "pixels"
    images: int = 2000
    k: int = 3
    needs: ClassVar[str] = "samples"

    @property
    def reference_images(self) -> int:
        return self.images

    def compared(self, reference: int) -> int:
        return min(self.images, reference)

    def build(self, reference: Tensor, like: PrecisionRecallScore | None = None) -> PrecisionRecallScore:
        """The metric with the reference (N, ...) already counted, each process a share of it; like: as for Frechet."""
        from flowmap.metrics.precision_recall import PrecisionRecallScore

        if self.k < 1:
            raise ValueError(f"metrics.k is {self.k}; 1 or more is allowed")
        features = build_features(self.features, reference) if like is None else like.features
        metric = PrecisionRecallScore(features, self.k).to(reference.device)
        metric.update(share(some(reference, self.images)), real=True)
        return metric

    def report(self, metric: PrecisionRecallScore) -> dict[str, float]:
        return {f"{name}_{short_name(self.features)}": float(value) for name, value in metric.compute().items()}


@dataclass(frozen=True)
class MMD(_InFeatures):
    """Maximum mean discrepancy of `images` generated samples to the reference, squared, unbiased, times 1000, by a Gaussian kernel.

    sigma: the kernel's width; None: the median distance between samples of the reference. unit: features are first divided by their length.
    CMMD (arXiv:2401.09603) is {features: clip, unit: true, sigma: 10}, and is reported under that name.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = None
    sigma: float | None = None
    unit: bool = False
    needs: ClassVar[str] = "samples"

    def __post_init__(self):
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma: {self.sigma} must be above 0")

    def compared(self, reference: int) -> int:
        return self.images

    def build(self, reference: Tensor, like: MaximumMeanDiscrepancy | None = None) -> MaximumMeanDiscrepancy:
        """The metric with the reference (N, ...) already counted, each process a share of it; like: as for Frechet, and for sigma."""
        from flowmap.metrics.mmd import MaximumMeanDiscrepancy, median_distance

        features = build_features(self.features, reference) if like is None else like.features
        metric = MaximumMeanDiscrepancy(features, sigma=self.sigma or 1.0, unit=self.unit).to(reference.device)
        if like is not None:
            metric.sigma = like.sigma
        elif self.sigma is None:
            metric.sigma = median_distance(metric.seen(some(reference, 1000)))
        metric.update(share(some(reference, self.reference_images)), real=True)
        return metric

    def report(self, metric: MaximumMeanDiscrepancy) -> dict[str, float]:
        clip = (self.features, self.unit, self.sigma) == ("clip", True, 10.0)
        return {"cmmd" if clip else f"mmd_{short_name(self.features)}": float(metric.compute())}


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


@dataclass(frozen=True)
class Inversion:
    """Reconstruction by inversion: `images` held-out samples carried to t = 1 by the velocity (`solver`), and back by the sampler.

    inversion_error is the mean squared error per value, of samples as training sees them; inversion_noise the mean squared norm of the
    noise per value (1 for N(0, I)), inversion_z how far that is off, in standard errors. Where guidance is an input, its default is used,
    and a guided velocity does not carry real samples to N(0, I).
    """

    images: int = 256
    solver: Solver = Heun(steps=32)
    needs: ClassVar[str] = "inversion"

    def __post_init__(self):
        if isinstance(self.solver, NoiseAnchored):
            raise ValueError("solver: the anchored rule runs from noise to data only; choose another to invert")

    def build(self) -> InversionScore:
        from flowmap.metrics.held_out import InversionScore

        return InversionScore()

    def report(self, metric: InversionScore) -> dict[str, float]:
        return {f"inversion_{name}": value for name, value in metric.compute().items()}


@dataclass(frozen=True)
class LossByTime:
    """The mean squared error per value of the velocity against the conditional one, x1 - x0 on the linear path, at each of `times`.

    Over `images` draws of the recipe's own coupling that were not trained on: held-out samples with fresh noise, or pairs made anew, with
    their teacher, from other noise. Its lowest value is the variance of x1 - x0 given xt: 0 for a straight coupling alone.
    """

    images: int = 1000
    times: tuple[float, ...] = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
    needs: ClassVar[str] = "loss"

    def __post_init__(self):
        if not self.times or not all(0 <= t <= 1 for t in self.times) or len(set(self.times)) < len(self.times):
            raise ValueError(f"times: {self.times} must be different numbers in [0, 1]")

    def build(self) -> LossByTimeScore:
        from flowmap.metrics.held_out import LossByTimeScore

        return LossByTimeScore(self.times)

    def report(self, metric: LossByTimeScore) -> dict[str, float]:
        return {f"loss_t{t:g}": value for t, value in zip(self.times, metric.losses(), strict=True)}


@dataclass(frozen=True)
class Agreement(_InFeatures):
    """The share of `images` samples in which a classifier sees the class that they were asked for.

    The classifier, a support vector machine on `features`, is fitted to `reference_images` real samples (None: all) and used by no loss.
    The floor is its figure on held-out samples, and on those with their classes shuffled. It rises as samples blur into the mean of their
    class: never use it alone.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = 5000
    needs: ClassVar[str] = "conditions"

    def build(self, reference: Tensor, conditions: Cond) -> ClassAgreement:
        """The metric, fitted to the reference (N, ...) with its "class" (N,)."""
        from flowmap.metrics.agreement import ClassAgreement

        real, labels = some(reference, self.reference_images), some(conditions["class"], self.reference_images)
        return ClassAgreement(build_features(self.features, reference), real, labels)

    def report(self, metric: ClassAgreement) -> dict[str, float]:
        return {f"agreement_{short_name(self.features)}": float(metric.compute())}


@dataclass(frozen=True)
class Retrieval(_InFeatures):
    """How often the caption of a sample is among the 1 and the 5 (`top`) nearest of `among` captions, over `images` samples.

    Nearest by a ridge regression from `features` to sentence embeddings, fitted to `reference_images` real samples (None: all). The floor
    is its figure on held-out samples, and on those with their captions shuffled; chance is top / among. Samples are drawn with captions
    of training, so one that repeats a training picture scores above held-out ones. It rises as samples blur into the mean of what their
    captions name: never use it alone.
    """

    features: str = "efficientnet_lite0"
    images: int = 1000
    among: int = 100
    top: tuple[int, ...] = (1, 5)
    reference_images: int | None = None
    needs: ClassVar[str] = "conditions"

    def __post_init__(self):
        if self.among < 2 or not self.top or not all(1 <= k < self.among for k in self.top):
            raise ValueError(f"top: {self.top} must lie in 1..{self.among - 1}, below among, which is 2 or more")

    def build(self, reference: Tensor, conditions: Cond) -> CaptionRetrieval:
        """The metric, fitted to the reference (N, ...) with its conditions of text (N, ...)."""
        from flowmap.metrics.agreement import CaptionRetrieval

        chosen = {key: some(value, self.reference_images) for key, value in conditions.items()}
        features = build_features(self.features, reference)
        return CaptionRetrieval(features, some(reference, self.reference_images), chosen, top=self.top, among=self.among)

    def report(self, metric: CaptionRetrieval) -> dict[str, float]:
        found = metric.compute().reshape(-1).tolist()  # torchmetrics makes a number of one entry
        return {f"retrieval_top{k}_{short_name(self.features)}": value for k, value in zip(self.top, found, strict=True)}


METRICS = {
    "frechet": Frechet,
    "precision_recall": PrecisionRecall,
    "mmd": MMD,
    "straightness": Straightness,
    "endpoint_error": EndpointError,
    "inversion": Inversion,
    "loss_by_time": LossByTime,
    "agreement": Agreement,
    "retrieval": Retrieval,
}


def some(x: Tensor, count: int | None, *, seed: int = 0) -> Tensor:
    """`count` rows of x (None or too many: all), in an order that depends on seed alone."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[order.to(x.device)]


def share(x: Tensor) -> Tensor:
    """This process's rows of what every process holds: metrics add up over processes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return x[torch.distributed.get_rank() :: torch.distributed.get_world_size()] if ready else x


def _dims(features, reference: Tensor) -> int:
    with torch.no_grad():
        found = features(reference[:2])
    if found.ndim != 2 or len(found) != 2:
        raise ValueError(f"features must map (B, ...) to (B, D); for B = 2 they gave {tuple(found.shape)}")
    return found.shape[1]
