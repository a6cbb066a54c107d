"""What a flow makes of real samples: how well it inverts them, and the loss of its velocity at each time.

Source: Lee, Lin, Fanti 2024, arXiv:2405.20320.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowmap.flow.prior import chi_square


class InversionScore(Metric):
    """Real samples carried to noise and back: the mean squared error per value, and whether the noise has the norm of N(0, I)."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("values", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("norms", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, x0: Tensor, x1: Tensor, back: Tensor) -> None:
        """Three (B, ...) of one shape: real samples, the noise that they were carried to, and what the sampler makes of that."""
        if not x0.shape == x1.shape == back.shape:
            raise ValueError(f"x0, x1 and back must have one shape, got {tuple(x0.shape)}, {tuple(x1.shape)} and {tuple(back.shape)}")
        self.error += (x0.double() - back.double()).square().sum()
        self.values += x0.numel()
        self.norms.append(x1.double().flatten(1).square().sum(1))

    def compute(self) -> dict[str, float]:
        """{"error": per value, and of `chi_square` "z", in standard errors, and "noise", the mean squared norm per value, 1 for N(0, I)}."""
        norms = dim_zero_cat(self.norms)
        dims = int(self.values) // len(norms)
        law = chi_square(norms.tolist(), dims)
        return {"error": float(self.error / self.values), "noise": law["mean"] / dims, "z": law["z"]}


class LossByTimeScore(Metric):
    """The mean squared error per value of a velocity at each of `times`."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, times: tuple[float, ...]):
        super().__init__()
        self.times = times
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(len(times), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, place: int, velocity: Tensor, vt: Tensor) -> None:
        """Two (B, ...) at times[place]: the flow's velocity and the conditional one."""
        self.total[place] += (velocity.double() - vt.double()).square().sum().cpu()
        self.count[place] += vt.numel()

    def compute(self) -> Tensor:
        """(len(times),) float64, of which torchmetrics makes a number where there is one time; `losses` is always a list."""
        return self.total / self.count

    def losses(self) -> list[float]:
        return self.compute().reshape(-1).tolist()
