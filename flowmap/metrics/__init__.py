"""What a recipe's `metrics` slot may name: METRICS maps a kind to a frozen spec whose `build()` gives a torchmetrics Metric.

Importing this costs nothing: torchmetrics is imported by `build()`.
"""

from flowmap.metrics.features import FEATURES
from flowmap.metrics.specs import METRICS, EndpointError, Frechet, PrecisionRecall, Straightness, floor

__all__ = ["FEATURES", "METRICS", "EndpointError", "Frechet", "PrecisionRecall", "Straightness", "floor"]
