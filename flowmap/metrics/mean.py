"""A mean over all updates of a metric, on all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanScore(Metric):
    """total / count, float64 of the given shape, which `update` adds to; lower is better."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, *shape: int):
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return self.total / self.count
