"""Metrics of a flow on real samples: how well it inverts them, and the loss of its velocity at each time.

Source: Lee, Lin, Fanti 2024, arXiv:2405.20320.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from flowmap.flow.prior import chi_square
from flowmap.metrics.mean import MeanScore


class InversionScore(MeanScore):
    """Real samples carried to noise and back: the mean squared error per value, and the norm of the noise."""

    def __init__(self):
        super().__init__()
        self.add_state("norms", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, x0: Tensor, x1: Tensor, back: Tensor) -> None:
        """Count three (B, ...) of one shape: real samples, the noise they were carried to, and the samples from it."""
        if not x0.shape == x1.shape == back.shape:
            raise ValueError(
                f"x0, x1 and back must have one shape, got {tuple(x0.shape)}, {tuple(x1.shape)} and {tuple(back.shape)}"
            )
        self.total += (x0.double() - back.double()).square().sum()
        self.count += x0.numel()
        self.norms.append(x1.double().flatten(1).square().sum(1))

    def compute(self) -> dict[str, float]:  # type: ignore[override]  # its total and count are one figure of three
        """{"error": per value, "noise": the mean squared norm per value, 1 for N(0, I), "z": its deviation from that}.

        z is in standard errors (`chi_square`).
        """
        norms = dim_zero_cat(self.norms)
        dims = int(self.count) // len(norms)
        law = chi_square(norms.tolist(), dims)
        return {"error": float(self.total / self.count), "noise": law["mean"] / dims, "z": law["z"]}


class LossByTimeScore(MeanScore):
    """The mean squared error per value of a velocity at each of `times`."""

    def __init__(self, times: tuple[float, ...]):
        super().__init__(len(times))
        self.times = times

    @torch.no_grad()
    def update(self, place: int, velocity: Tensor, vt: Tensor) -> None:
        """Count the flow's velocity and the conditional one, two (B, ...), at times[place]."""
        self.total[place] += (velocity.double() - vt.double()).square().sum().to(self.total.device)
        self.count[place] += vt.numel()

    def losses(self) -> list[float]:
        """compute() as a list: torchmetrics makes a number of it if there is one time."""
        return self.compute().reshape(-1).tolist()
