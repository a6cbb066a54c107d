"""Metrics of two sets of samples, as values that a recipe may ask for, and METRICS, the table of all kinds.

`report(metric)` gives results under the names of metrics.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowmap.base.schema import added
from flowmap.metrics.against import TRAIN, Against, HasReferences, Side, count_real
from flowmap.metrics.asked_specs import Agreement, Retrieval
from flowmap.metrics.baseline import baseline
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.flow_specs import EndpointError, Inversion, LossByTime, Straightness
from flowmap.metrics.nearest_spec import NearestNeighbour
from flowmap.metrics.real import Device, Features, Real, some
from flowmap.metrics.reference import AUTO, HELD_OUT, UNKNOWN, check_reference, statistics_for
from flowmap.metrics.spec import (
    MAX_SAMPLES,
    SAMPLES,
    Classes,
    Drawn,
    DrawnBatch,
    InFeatures,
    Sizes,
    Spec,
    enough,
    within,
)
from flowmap.metrics.statistics import Statistics

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.frechet import FrechetDistance
    from flowmap.metrics.mmd import MaximumMeanDiscrepancy
    from flowmap.metrics.precision_recall import PrecisionRecallScore


class Samples(Spec):
    """A metric of two sets of samples; `build(reference, like)` makes one that has counted the reference."""

    on_samples: ClassVar[bool] = True
    least: ClassVar[int] = 2  # samples of each
    kind: ClassVar[str] = "a metric of samples"  # its name in METRICS

    def __post_init__(self):
        super().__post_init__()
        within(self, images=(self.least, MAX_SAMPLES))

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        super().fits(data, conditional=conditional, paired=paired)
        enough(self.kind, self.least, data)

    def build(self, reference: Tensor, like: Any = None) -> Any:
        """The metric with the reference (N, ...) already counted, in the feature space of `like`, if given."""
        return self.build_from(Real(reference, reference.device), like)

    def build_from(self, real: Real, like: Any = None, places: Tensor | None = None) -> Any:
        """The metric on the device of `real`, with the samples at those places (default: all) already counted.

        By default they are all read at once and given to `build`.
        """
        rows = torch.arange(len(real)) if places is None else places
        return self.build(real.rows[rows].to(real.device), like).to(real.device)

    def report(self, metric: Any) -> dict[str, float]:
        """The figures of what the metric has counted, under their names."""
        raise NotImplementedError

    def sides(self, real: Mapping[str, Real]) -> dict[str, Side]:
        """The metric with each reference already counted, by the suffix of its keys.

        real: training samples under `TRAIN` and, if any are held out, those under "".
        """
        trained = Side(self.build_from(real[TRAIN]), len(real[TRAIN]))
        return self._own(real, "", trained.metric) | {TRAIN: trained}

    def _own(self, real: Mapping[str, Real], suffix: str, like: Any) -> dict[str, Side]:
        """The metric with the data's own samples of one kind, in the feature space of `like`; {} if there are none."""
        if suffix not in real:
            return {}
        return {suffix: Side(self.build_from(real[suffix], like=like), len(real[suffix]))}

    def compare(self, data: HasReferences, device: Device = "cpu") -> Against:
        """The metric with each reference of the data already counted."""
        return Against(self, data, device)

    def build_on(self, data: HasReferences, device: Device = "cpu") -> Against:
        return self.compare(data, device)

    def begin(self, metric: Against) -> None:
        metric.reset()

    def update(self, metric: Against, batch: DrawnBatch) -> None:
        metric.update(batch.samples, world=batch.world)

    def measure(self, metric: Against, drawn: Drawn) -> dict[str, float]:
        return metric.report()

    def baseline(self, metric: Against, data: HasReferences, classes: Classes | None = None) -> dict[str, float]:
        return baseline(metric, data, classes)

    def bias(self, reference: int, generated: int) -> float:
        """Proportional to the bias of the figure for so many reference and generated samples; 1 if no law is known."""
        return 1.0

    def compared(self, reference: int) -> int:
        """The number of generated samples that are compared with `reference` real ones."""
        return self.images

    def features_of(self, metric: Any) -> Callable[[Tensor], Tensor] | None:
        """The function that gives the features of x for `update(x, real, found)`, if the metric has one."""
        return None


class _InSpace(InFeatures, Samples):
    """A metric of samples in a feature space that is fitted to the training samples.

    `reference_images` of the reference are counted, drawn with a fixed seed (None: all), a chunk at a time and each in
    one process.
    """

    reference_images: int | None

    def __post_init__(self):
        super().__post_init__()
        within(self, reference_images=(self.least, MAX_SAMPLES))

    def metric(self, features: Features, real: Real, like: Any) -> Any:
        """The metric in that feature space, with nothing counted; like: as in `build`."""
        raise NotImplementedError

    def build_from(self, real: Real, like: Any = None, places: Tensor | None = None) -> Any:
        features = self._features(real) if like is None else like.features
        metric = self.metric(features, real, like).to(real.device)
        rows = torch.arange(len(real)) if places is None else places
        count_real(self, metric, real, rows[some(len(rows), self.reference_images)], real=True)
        return metric

    def _features(self, real: Real) -> Features:
        return build_features(self.features, real.rows, real.device, weights=self.weights)

    def features_of(self, metric: Any) -> Callable[[Tensor], Tensor]:
        return metric.features


@dataclass(frozen=True)
class Frechet(_InSpace):
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
        if (dims := _dims(features, real)) != statistics.width:
            what = f"is of {statistics.width} features, and {self.features!r} has {dims}"
            raise ValueError(f"metrics: reference: {self.reference}: {what}")
        return Side(FrechetDistance(features, dims, given=statistics).to(real.device), statistics.count or UNKNOWN)

    def metric(self, features: Features, real: Real, like: FrechetDistance | None) -> FrechetDistance:
        from flowmap.metrics.frechet import FrechetDistance

        return FrechetDistance(features, dims=_dims(features, real))

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
class PrecisionRecall(_InSpace):
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

    def metric(self, features: Features, real: Real, like: PrecisionRecallScore | None) -> PrecisionRecallScore:
        from flowmap.metrics.precision_recall import PrecisionRecallScore

        return PrecisionRecallScore(features, self.k)

    def report(self, metric: PrecisionRecallScore) -> dict[str, float]:
        return {f"{name}_{short_name(self.features)}": float(value) for name, value in metric.compute().items()}


@dataclass(frozen=True)
class MMD(_InSpace):
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


def _dims(features: Features, real: Real) -> int:
    with torch.no_grad():
        found = features(real.rows[:2].to(real.device))
    if found.ndim != 2 or len(found) != 2:
        raise ValueError(f"features must map (B, ...) to (B, D); for B = 2 they gave {tuple(found.shape)}")
    return found.shape[1]
