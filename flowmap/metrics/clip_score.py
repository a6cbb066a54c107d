"""The CLIP score: does a picture show what its caption says? 100 times a mean cosine of CLIP's two embeddings.

Source: Hessel et al. 2021, arXiv:2104.08718, in torchmetrics' form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flowmap.metrics.picture_nets import transformers_source
from flowmap.metrics.real import Device
from flowmap.metrics.spec import Classes, Drawn, DrawnBatch, Sizes, Spec

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.clip_model import CLIPMean


@dataclass(frozen=True)
class CLIPScore(Spec):
    """The CLIP score of `images` generated pictures with the captions of evaluation.captions that they were drawn from.

    model: a CLIP of transformers, as a folder or a hub id in the cache, safetensors. Figures of different models cannot
    be compared, so that the name of the model is in the key. Text longer than the model reads is cut off.
    """

    model: str = "openai/clip-vit-large-patch14"
    images: int = 30_000
    wants_captions: ClassVar[bool] = True

    @property
    def picture_network(self) -> str:
        return "clip_score"

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        shape = tuple(data.reference_shape)
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"metrics: clip_score looks at pictures of 1 or 3 channels, and the samples have shape {shape}"
            )

    def check(self) -> None:
        transformers_source("clip_score", self.model)

    def build_on(self, data: Any, device: Device = "cpu") -> CLIPMean:
        from flowmap.metrics.clip_model import CLIPMean

        return CLIPMean(transformers_source("clip_score", self.model)).to(device)

    def begin(self, metric: CLIPMean) -> None:
        metric.reset()

    def update(self, metric: CLIPMean, batch: DrawnBatch) -> None:
        if rows := batch.of_first(self.images):
            captions: Sequence[str] = batch.captions()
            metric.update(batch.samples[:rows], captions[:rows])

    def measure(self, metric: CLIPMean, drawn: Drawn) -> dict[str, float]:
        return {score_key(self.model): float(metric.compute())}

    def baseline(self, metric: CLIPMean, data: Any, classes: Classes | None = None) -> dict[str, float]:
        return {}


def score_key(model: str) -> str:
    """The name of the score in metrics.json, by the folder or the hub id of the model."""
    return f"clip_score_{Path(model).name.removeprefix('clip-')}"
