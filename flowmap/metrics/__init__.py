"""The metrics of a recipe: METRICS maps a kind to a frozen spec that builds a torchmetrics Metric.

Importing this room is quick: torchmetrics is imported when a metric is built.
"""

from flowmap.base import torchvision_shim
from flowmap.metrics.against import TRAIN, Against
from flowmap.metrics.asked_specs import Agreement, Retrieval
from flowmap.metrics.baseline import baseline, baselines
from flowmap.metrics.checks import check_metrics, lacking
from flowmap.metrics.clip_score import CLIPScore
from flowmap.metrics.features import FEATURES
from flowmap.metrics.flow_specs import EndpointError, Inversion, LossByTime, Straightness
from flowmap.metrics.sample_specs import Samples
from flowmap.metrics.spec import Drawn, DrawnBatch, Spec
from flowmap.metrics.specs import METRICS, MMD, Frechet, NearestNeighbour, PrecisionRecall
from flowmap.metrics.text import Distinct, Memorised, Perplexity, SelfBLEU, TextDivergence
from flowmap.metrics.text_conditioned import ContentKept, Control, Infilled, Phrase, StyleHit, TagHit

torchvision_shim.install()  # libraries that this room imports import torchvision

METRICS |= {
    "distinct": Distinct,
    "self_bleu": SelfBLEU,
    "text_divergence": TextDivergence,
    "memorised": Memorised,
    "control": Control,
    "phrase": Phrase,
    "tag_hit": TagHit,
    "content_kept": ContentKept,
    "style_hit": StyleHit,
    "infilled": Infilled,
    "perplexity": Perplexity,
    "clip_score": CLIPScore,
}

__all__ = [
    "FEATURES",
    "TRAIN",
    "Against",
    "METRICS",
    "MMD",
    "CLIPScore",
    "NearestNeighbour",
    "Agreement",
    "EndpointError",
    "Frechet",
    "Inversion",
    "LossByTime",
    "PrecisionRecall",
    "Retrieval",
    "Samples",
    "Drawn",
    "DrawnBatch",
    "Spec",
    "Straightness",
    "check_metrics",
    "baseline",
    "baselines",
    "lacking",
]
