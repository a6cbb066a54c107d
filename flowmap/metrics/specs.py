"""Metrics of two sets of samples, as values that a recipe may ask for, and METRICS, the table of all kinds.

`report(metric)` gives results under the names of metrics.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flowmap.base.schema import added
from flowmap.metrics.against import TRAIN, Side
from flowmap.metrics.asked_specs import Agreement, Retrieval
from flowmap.metrics.features import short_name
from flowmap.metrics.flow_specs import EndpointError, Inversion, LossByTime, Straightness
from flowmap.metrics.nearest_spec import NearestNeighbour
from flowmap.metrics.real import Features, Real, some
from flowmap.metrics.reference import AUTO, HELD_OUT, UNKNOWN, check_reference, statistics_for
from flowmap.metrics.sample_specs import InSpace, dims_of, kept_bytes
from flowmap.metrics.spec import (
    SAMPLES,
    Sizes,
    Spec,
    within,
)
from flowmap.metrics.statistics import Statistics

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.frechet import FrechetDistance
    from flowmap.metrics.mmd import MaximumMeanDiscrepancy
    from flowmap.metrics.precision_recall import PrecisionRecallScore


@dataclass(frozen=True)
class Frechet(InSpace):
    """Frechet distance of `images` generated samples to the reference.

    `reference_images` of it are used, drawn with a fixed seed (None: all). reference: a file with the mean and the
    covariance of a whole reference set, an .npz with mu and sigma; "auto": those of all training pictures, which `fit`
    computes once and keeps. reference_of: the set that the file is of, "train" or "held_out"; the distance to it has
    the key of that set, and takes the place of the distance to the data's own samples of the kind. weights: the file,
    folder or hub id of the network's weights.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = None
    reference: str | None = added(None)
    reference_of: str = added("train")
    weights: str | None = added(None)
    kind: ClassVar[str] = "frechet"

    def __post_init__(self):
        super().__post_init__()
        check_reference(self.reference, self.reference_of, self.features, self.reference_images)

    def check(self) -> None:
        super().check()
        if self.reference not in (None, AUTO):
            self._statistics()

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.reference in (None, AUTO) else (str(self.reference),)

    def sides(self, real: Mapping[str, Real]) -> dict[str, Side]:
        if self.reference is None:
            return super().sides(real)
        given = self._given(real[TRAIN])
        if self.reference_of == HELD_OUT:
            return {"": given} | self._own(real, TRAIN, given.metric)
        return self._own(real, "", given.metric) | {TRAIN: given}

    def _statistics(self) -> Statistics:
        return statistics_for(str(self.reference), self.features, self.weights)

    def _given(self, real: Real) -> Side:
        """The metric with the reference of the file."""
        from flowmap.metrics.frechet import FrechetDistance

        statistics, features = self._statistics(), self._features(real)
        if (dims := dims_of(features, real)) != statistics.width:
            what = f"is of {statistics.width} features, and {self.features!r} has {dims}"
            raise ValueError(f"metrics: reference: {self.reference}: {what}")
        return Side(FrechetDistance(features, dims, given=statistics).to(real.device), statistics.count or UNKNOWN)

    def held_bytes(self, width: int, training: int, held_out: int) -> float:
        """Sums of outer products of real and generated samples, with their defaults, and the matrices of the root."""
        sides = 2 if held_out else 1
        return 8.0 * width**2 * (4 * sides + 8)

    def metric(self, features: Features, real: Real, like: FrechetDistance | None) -> FrechetDistance:
        from flowmap.metrics.frechet import FrechetDistance

        return FrechetDistance(features, dims=dims_of(features, real))

    def bias(self, reference: int, generated: int) -> float:
        """Proportional to 1/n + 1/m for n samples of the reference and m generated ones."""
        return 1 / min(reference, self.reference_images or reference) + 1 / generated

    @property
    def key(self) -> str:
        """Its name in metrics.json."""
        return f"frechet_{short_name(self.features)}"

    def report(self, metric: FrechetDistance) -> dict[str, float]:
        return {self.key: float(metric.compute())}


@dataclass(frozen=True)
class PrecisionRecall(InSpace):
    """Precision and recall of `images` generated samples against as many of the reference, by k-th nearest neighbours.

    If fewer are held out, as many generated samples are compared with them.
    """

    features: str = "pixels"
    images: int = 2000
    k: int = 3
    weights: str | None = added(None)
    kind: ClassVar[str] = "precision_recall"

    def __post_init__(self):
        within(self, k=SAMPLES)
        super().__post_init__()

    @property
    def least(self) -> int:  # type: ignore[override]  # a constant of the other metrics
        return self.k + 1

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        if self.images > data.num_reference:
            raise ValueError(
                f"metrics.images: precision_recall compares {self.images} with as many training samples, "
                f"and there are {data.num_reference}"
            )
        super().fits(data, conditional=conditional, paired=paired)

    @property
    def reference_images(self) -> int:  # type: ignore[override]  # a setting of the other metrics
        return self.images

    def compared(self, reference: int) -> int:
        return min(self.images, reference)

    def held_bytes(self, width: int, training: int, held_out: int) -> float:
        return kept_bytes(self, width, (training, held_out))

    def metric(self, features: Features, real: Real, like: PrecisionRecallScore | None) -> PrecisionRecallScore:
        from flowmap.metrics.precision_recall import PrecisionRecallScore

        return PrecisionRecallScore(features, self.k)

    def report(self, metric: PrecisionRecallScore) -> dict[str, float]:
        return {f"{name}_{short_name(self.features)}": float(value) for name, value in metric.compute().items()}


@dataclass(frozen=True)
class MMD(InSpace):
    """Maximum mean discrepancy of `images` generated samples to the reference, by a Gaussian kernel.

    It is squared, unbiased, and multiplied by 1000. sigma: the kernel's width; None: the median distance between
    samples of the reference. unit: features are first divided by their length. CMMD (arXiv:2401.09603) is {features:
    clip, unit: true, sigma: 10}, and is reported under that name.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = None
    sigma: float | None = None
    unit: bool = False
    weights: str | None = added(None)
    kind: ClassVar[str] = "mmd"

    def __post_init__(self):
        super().__post_init__()
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma: {self.sigma} must be above 0")

    def held_bytes(self, width: int, training: int, held_out: int) -> float:
        return kept_bytes(self, width, (training, held_out))

    def metric(self, features: Features, real: Real, like: MaximumMeanDiscrepancy | None) -> MaximumMeanDiscrepancy:
        from flowmap.metrics.mmd import MaximumMeanDiscrepancy, median_distance

        metric = MaximumMeanDiscrepancy(features, sigma=self.sigma or 1.0, unit=self.unit)
        if like is not None:
            metric.sigma = like.sigma
        elif self.sigma is None:
            few = real.all_features(features, some(len(real), 1000))
            metric.sigma = median_distance(metric.scaled(few))
        return metric

    @property
    def key(self) -> str:
        """Its name in metrics.json."""
        clip = (self.features, self.unit, self.sigma) == ("clip", True, 10.0)
        return "cmmd" if clip else f"mmd_{short_name(self.features)}"

    def report(self, metric: MaximumMeanDiscrepancy) -> dict[str, float]:
        return {self.key: float(metric.compute())}


METRICS: dict[str, type[Spec]] = {
    "frechet": Frechet,
    "precision_recall": PrecisionRecall,
    "mmd": MMD,
    "nearest_neighbour": NearestNeighbour,
    "straightness": Straightness,
    "endpoint_error": EndpointError,
    "inversion": Inversion,
    "loss_by_time": LossByTime,
    "agreement": Agreement,
    "retrieval": Retrieval,
}
