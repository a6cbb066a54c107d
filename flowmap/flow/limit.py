"""Limits on predicted data: a velocity whose x0 leaves the allowed range becomes the velocity towards the x0 that is kept inside.

Clock: 0 data, 1 noise. A velocity v at (x, t) predicts x0 = x - t v; with x0' in its place it is (x - x0') / t = v + (x0 - x0') / t. Diffusion
samplers clip x0 at every step (Ho et al. 2020, arXiv:2006.11239) or threshold it (Saharia et al. 2022, arXiv:2205.11487).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.path import wide
from flowmap.flow.types import broadcast_time


@dataclass(frozen=True)
class Clip:
    """Every value of x0 in [-bound, bound]."""

    bound: float = 1.0

    def __post_init__(self):
        if not self.bound > 0:
            raise ValueError(f"clip_sample_range: {self.bound} must be above 0")

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class Threshold:
    """x0 clipped at +-s and divided by s, where s is the `ratio` quantile of one sample's |x0|, at least 1 and at most `most`."""

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
    """The velocity whose predicted x0 is the limited one; equal to v where the limit changes nothing.

    v and x are (B, ...), t is (B,). Below `first` x - x0 is divided by `first`, since 1 / t grows without bound. Above `last`, where a
    schedule ends, t counts as `last`.
    """
    t = wide(t).clamp(max=last)
    x0 = x - broadcast_time(t, x).to(x.dtype) * v
    kept = limit(x0)
    return torch.where(
        kept == x0, v, (x - kept) / broadcast_time(t.clamp(min=first), x).to(x.dtype)
    )  # v as it is: no rounding where nothing changes
