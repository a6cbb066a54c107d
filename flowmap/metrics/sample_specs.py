"""The base of metrics that compare two sets of samples, and of those that do so in a feature space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowmap.metrics.against import TRAIN, Against, HasReferences, Side, count_real
from flowmap.metrics.baseline import baseline
from flowmap.metrics.features import build_features
from flowmap.metrics.real import CHUNK, Device, Features, Real, some
from flowmap.metrics.spec import MAX_SAMPLES, Classes, Drawn, DrawnBatch, InFeatures, Sizes, Spec, enough, within


class OnSamples(Spec):
    """A metric of generated samples alone; what is built on the data has reset, update, report and a baseline."""

    on_samples: ClassVar[bool] = True

    def compare(self, data: HasReferences, device: Device = "cpu") -> Any:
        """The metric with each reference of the data already counted."""
        raise NotImplementedError

    def build_on(self, data: HasReferences, device: Device = "cpu") -> Any:
        return self.compare(data, device)

    def begin(self, metric: Any) -> None:
        metric.reset()

    def update(self, metric: Any, batch: DrawnBatch) -> None:
        metric.update(batch.samples, world=batch.world)

    def measure(self, metric: Any, drawn: Drawn) -> dict[str, float]:
        return metric.report()


class Samples(OnSamples):
    """A metric of two sets of samples; `build(reference, like)` makes one that has counted the reference."""

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


class InSpace(InFeatures, Samples):
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


def kept_bytes(spec: InSpace, width: int, real: tuple[int, ...]) -> float:
    """The bytes of all features of both references and of generated samples, and of those of one side at the end.

    They are gathered over processes and joined; two chunks of rows of a matrix of all pairs come to that.
    """
    sides = [(min(count, spec.reference_images or count), spec.compared(count)) for count in real if count]
    most = max(sides, key=sum)
    return 8.0 * (width * (sum(map(sum, sides)) + 2 * sum(most)) + 2 * CHUNK * max(most))


def dims_of(features: Features, real: Real) -> int:
    with torch.no_grad():
        found = features(real.rows[:2].to(real.device))
    if found.ndim != 2 or len(found) != 2:
        raise ValueError(f"features must map (B, ...) to (B, D); for B = 2 they gave {tuple(found.shape)}")
    return found.shape[1]
