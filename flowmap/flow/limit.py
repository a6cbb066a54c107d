"""Clipping and thresholding of the x0 that a velocity predicts, as a change of the velocity.

Clock: 0 data, 1 noise. A velocity v at (x, t) predicts x0 = x - t v; the velocity that predicts x0' instead is
(x - x0') / t = v + (x0 - x0') / t. Diffusion samplers clip x0 at every step (Ho et al. 2020, arXiv:2006.11239) or
threshold it (Saharia et al. 2022, arXiv:2205.11487).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.path import wide
from flowmap.flow.types import broadcast_time


@dataclass(frozen=True)
class Clip:
    """Clip x0 to [-bound, bound]."""

    bound: float = 1.0

    def __post_init__(self):
        if not self.bound > 0:
            raise ValueError(f"clip_sample_range: {self.bound} must be above 0")

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class Threshold:
    """Clip x0 to [-s, s] and divide it by s: the `ratio` quantile of a sample's |x0|, clamped to [1, most]."""

    ratio: float = 0.995
    most: float = 1.0

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio: {self.ratio} must lie in [0, 1]")
        if not self.most >= 1:
            raise ValueError(f"sample_max_value: {self.most} must be 1 or more")

    def __call__(self, x0: Tensor) -> Tensor:
        size = torch.quantile(wide(x0).flatten(1).abs(), self.ratio, dim=1).clamp(1, self.most).to(x0.dtype)
        size = broadcast_time(size, x0)
        return torch.maximum(torch.minimum(x0, size), -size) / size


Limit = Clip | Threshold


def limited(v: Tensor, x: Tensor, t: Tensor, limit: Limit, *, first: float = 1e-4, last: float = 1.0) -> Tensor:
    """The velocity that predicts limit(x0); bit-equal to v where the limit changes nothing.

    v and x are (B, ...), t is (B,). Below `first` the division is by `first`, since 1 / t is unbounded. Above `last`,
    where a schedule ends, t is replaced by `last`.
    """
    t = wide(t).clamp(max=last)
    x0 = x - broadcast_time(t, x).to(x.dtype) * v
    kept = limit(x0)
    towards = (x - kept) / broadcast_time(t.clamp(min=first), x).to(x.dtype)
    return torch.where(kept == x0, v, towards)
