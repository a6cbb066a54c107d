"""Metrics of samples with their conditions: does each sample show what was asked for?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.metrics.against import HasReferences
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.real import CHUNK, Device, Features, Real, Rows, mine, some
from flowmap.metrics.spec import MAX_SAMPLES, Classes, Drawn, DrawnBatch, InFeatures, Sizes, within

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.agreement import CaptionRetrieval, ClassAgreement


Conditions = Callable[[Tensor], Cond]  # places -> the conditions of the samples there


class OfConditions(InFeatures):
    """A metric of samples with their conditions, fitted to `reference_images` training samples and theirs."""

    reference_images: int | None

    def build(self, reference: Rows, conditions: Conditions, device: Device = "cpu") -> Any:
        """The metric on that device, fitted to samples of the reference (N, ...) with their conditions."""
        real = Real(reference, device)
        features = build_features(self.features, reference, device)
        places = some(len(real), self.reference_images)
        asked = torch.cat([self.asked(conditions(part)).to(device) for part in places.split(CHUNK)])
        return self.metric(features, real.all_features(features, places), asked).to(device)

    def asked(self, cond: Cond) -> Tensor:
        """What the metric takes of the conditions, row by row."""
        raise NotImplementedError

    def metric(self, features: Features, real: Tensor, asked: Tensor) -> Any:
        """The metric, fitted to real samples by their features (N, D) and what was asked for."""
        raise NotImplementedError

    def report(self, metric: Any) -> dict[str, float]:
        """The figures of what the metric has counted, under their names."""
        raise NotImplementedError

    def build_on(self, data: HasReferences, device: Device = "cpu") -> Any:
        return self.build(data.reference, data.reference_conditions_at, device)

    def begin(self, metric: Any) -> None:
        metric.reset()

    def update(self, metric: Any, batch: DrawnBatch) -> None:
        if rows := batch.of_first(self.images):
            metric.update(batch.samples[:rows], {key: value[:rows] for key, value in batch.conditions().items()})

    def measure(self, metric: Any, drawn: Drawn) -> dict[str, float]:
        return self.report(metric)

    def baseline(self, metric: Any, data: HasReferences, classes: Classes | None = None) -> dict[str, float]:
        """The figures of held-out samples with their own conditions, and, as `..._shuffled`, with those of others.

        The first is the ceiling, the second is chance. At most `images` samples; {} where no held-out sample has a
        condition.
        """
        real = Real(data.held_out, metric.device)
        if not len(real) or not data.held_out_conditions_at(torch.zeros(1, dtype=torch.int64)):
            return {}
        found: dict[str, float] = {}
        places = some(len(real), self.images)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
        for suffix, asked in (("", places), ("_shuffled", places[order])):
            metric.reset()
            own = torch.isin(places, mine(places))
            parts = zip(real.features(metric.features, places[own]), asked[own].split(real.chunk), strict=True)
            for features, theirs in parts:
                metric.update(None, data.held_out_conditions_at(theirs), found=features)
            found |= {f"{key}{suffix}": value for key, value in self.report(metric).items()}
        return found


@dataclass(frozen=True)
class Agreement(OfConditions):
    """The share of `images` samples in which a classifier finds the class that was asked for.

    The classifier, a support vector machine on `features`, is fitted to `reference_images` real samples (None: all) and
    used by no loss. Its baseline is the figure of held-out samples, and of those with their classes shuffled. It rises
    as samples blur into the mean of their class: never use it alone.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = 5000

    def __post_init__(self):
        super().__post_init__()
        within(self, reference_images=(2, MAX_SAMPLES))

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        if data.num_classes is None or not conditional:
            raise ValueError(
                "metrics: agreement needs data with classes that are given to the network; "
                "for captions there is retrieval"
            )
        super().fits(data, conditional=conditional, paired=paired)

    def asked(self, cond: Cond) -> Tensor:
        return cond["class"]

    def metric(self, features: Features, real: Tensor, asked: Tensor) -> ClassAgreement:
        from flowmap.metrics.agreement import ClassAgreement

        return ClassAgreement(features, real, asked)

    def report(self, metric: ClassAgreement) -> dict[str, float]:
        return {f"agreement_{short_name(self.features)}": float(metric.compute())}


@dataclass(frozen=True)
class Retrieval(OfConditions):
    """How often the caption of a sample is among the 1 and the 5 (`top`) nearest of `among` captions.

    It is measured over `images` samples. Nearest is by a ridge regression from `features` to sentence embeddings,
    fitted to `reference_images` real samples (None: all). Its baseline is the figure of held-out samples, and of those
    with their captions shuffled; chance is top / among. Samples are drawn with captions of training, so that one that
    repeats a training picture scores above held-out ones. It rises as samples blur into the mean of their caption:
    never use it alone.
    """

    features: str = "efficientnet_lite0"
    images: int = 1000
    among: int = 100
    top: tuple[int, ...] = (1, 5)
    reference_images: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.among < 2 or not self.top or not all(1 <= k < self.among for k in self.top):
            raise ValueError(f"top: {self.top} must lie in 1..{self.among - 1}, below among, which is 2 or more")
        within(self, reference_images=(self.among + 1, MAX_SAMPLES))

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        keys = set(data.example_conditions()) if conditional else set()
        if not {"pooled", "text"} & keys:
            raise ValueError(
                "metrics: retrieval needs data with captions that are given to the network; "
                "for classes there is agreement"
            )
        super().fits(data, conditional=conditional, paired=paired)
        if (count := min(data.num_reference, self.reference_images or MAX_SAMPLES)) <= self.among:
            raise ValueError(f"metrics.among: {self.among} wants more captions of real samples; there are {count}")

    def asked(self, cond: Cond) -> Tensor:
        from flowmap.metrics.agreement import sentences

        return sentences(cond)

    def metric(self, features: Features, real: Tensor, asked: Tensor) -> CaptionRetrieval:
        from flowmap.metrics.agreement import CaptionRetrieval

        return CaptionRetrieval(features, real, asked, top=self.top, among=self.among)

    def report(self, metric: CaptionRetrieval) -> dict[str, float]:
        found = metric.compute().reshape(-1).tolist()  # torchmetrics turns one entry into a number
        return {
            f"retrieval_top{k}_{short_name(self.features)}": value for k, value in zip(self.top, found, strict=True)
        }
