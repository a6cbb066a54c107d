"""The straightness of a sampler's paths, and the distance of its few-step end points from its many-step ones.

Source: Lee, Lin, Fanti 2024, arXiv:2405.20320 (both); straightness: Liu, Gong, Liu 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmap.flow.types import broadcast_time
from flowmap.metrics.mean import MeanScore


class StraightnessScore(MeanScore):
    """S = mean over steps of |dx/dt - (x1_end - x0_start)|^2 per dimension; 0 on straight paths at constant speed.

    Steps are weighted by their length in t: S is the integral over time, and the plain mean if steps are equal.
    """

    @torch.no_grad()
    def update(self, trajectory: Tensor, times: Tensor) -> None:
        """Count a trajectory (T, B, ...) at times (T,), strictly up or down; raises ValueError for others."""
        steps = times.double().diff()
        if (
            times.ndim != 1
            or len(times) != len(trajectory)
            or len(times) < 2
            or not ((steps > 0).all() or (steps < 0).all())
        ):
            raise ValueError(
                f"times must be ({len(trajectory)},), 2 or more, strictly up or down; got {tuple(times.shape)}"
            )
        x, length, steps = trajectory.double(), times[-1].double() - times[0].double(), steps.to(trajectory.device)
        off = (x.diff(dim=0) / broadcast_time(steps, x[1:]) - (x[-1] - x[0]) / length).square().flatten(1).mean(1)
        self.total += (off * steps / length).sum() * x.shape[1]
        self.count += x.shape[1]


class EndpointScore(MeanScore):
    """Root mean square, per dimension, between few-step and many-step end points from the same noise."""

    @torch.no_grad()
    def update(self, few: Tensor, many: Tensor) -> None:
        """Count two (B, ...) of one shape, row by row from the same noise and condition."""
        if few.shape != many.shape:
            raise ValueError(f"end points must have one shape, got {tuple(few.shape)} and {tuple(many.shape)}")
        self.total += (few.double() - many.double()).square().sum()
        self.count += few.numel()

    def compute(self) -> Tensor:
        return super().compute().sqrt()
