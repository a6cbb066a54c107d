"""What a recipe may ask for of samples with their conditions: does each show what was asked for?  `needs` and `report`: see specs.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.spec import MAX_SAMPLES, InFeatures, Sizes, some, within

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.agreement import CaptionRetrieval, ClassAgreement


@dataclass(frozen=True)
class Agreement(InFeatures):
    """The share of `images` samples in which a classifier sees the class that they were asked for.

    The classifier, a support vector machine on `features`, is fitted to `reference_images` real samples (None: all) and used by no loss.
    The floor is its figure on held-out samples, and on those with their classes shuffled. It rises as samples blur into the mean of their
    class: never use it alone.
    """

    features: str = "pixels"
    images: int = 2000
    reference_images: int | None = 5000
    needs: ClassVar[str] = "conditions"

    def __post_init__(self):
        super().__post_init__()
        within(self, reference_images=(2, MAX_SAMPLES))

    def build(self, reference: Tensor, conditions: Cond) -> ClassAgreement:
        """The metric, fitted to the reference (N, ...) with its "class" (N,)."""
        from flowmap.metrics.agreement import ClassAgreement

        real, labels = some(reference, self.reference_images), some(conditions["class"], self.reference_images)
        return ClassAgreement(build_features(self.features, reference), real, labels)

    def report(self, metric: ClassAgreement) -> dict[str, float]:
        return {f"agreement_{short_name(self.features)}": float(metric.compute())}


@dataclass(frozen=True)
class Retrieval(InFeatures):
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
        super().__post_init__()
        if self.among < 2 or not self.top or not all(1 <= k < self.among for k in self.top):
            raise ValueError(f"top: {self.top} must lie in 1..{self.among - 1}, below among, which is 2 or more")
        within(self, reference_images=(self.among + 1, MAX_SAMPLES))

    def fits(self, data: Sizes) -> None:
        super().fits(data)
        if (count := min(data.num_reference, self.reference_images or MAX_SAMPLES)) <= self.among:
            raise ValueError(f"metrics.among: {self.among} wants more captions of real samples; there are {count}")

    def build(self, reference: Tensor, conditions: Cond) -> CaptionRetrieval:
        """The metric, fitted to the reference (N, ...) with its conditions of text (N, ...)."""
        from flowmap.metrics.agreement import CaptionRetrieval

        chosen = {key: some(value, self.reference_images) for key, value in conditions.items()}
        features = build_features(self.features, reference)
        return CaptionRetrieval(
            features, some(reference, self.reference_images), chosen, top=self.top, among=self.among
        )

    def report(self, metric: CaptionRetrieval) -> dict[str, float]:
        found = metric.compute().reshape(-1).tolist()  # torchmetrics makes a number of one entry
        return {
            f"retrieval_top{k}_{short_name(self.features)}": value for k, value in zip(self.top, found, strict=True)
        }
