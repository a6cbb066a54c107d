"""The branch of a student that says how large its error is at a departure and an arrival; it trains with the student and never ships.

Source: EDM2, arXiv:2312.02696 (one linear layer on Fourier features of the noise level); here of both times, with one hidden layer between.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmap.nets.discriminator import in_float32
from flowmap.nets.embed import ScalarEmbedding
from flowmap.nets.flow_map import FlowMapNet


class Uncertainty(nn.Module):
    """u(t, s), (B,) for t and s (B,), in float32 or better whatever autocast says: 0 at the start."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.departure, self.interval = ScalarEmbedding(width), ScalarEmbedding(width)
        self.leave = nn.Linear(width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        with in_float32(t.device):
            return self.leave(
                nn.functional.silu(self.departure(t) + self.interval(t - s)).to(self.leave.weight.dtype)
            ).squeeze(-1)


def with_uncertainty(flow_map: FlowMapNet, seed: int) -> FlowMapNet:
    """The student, given such a branch, the same one for the same seed; itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow_map.uncertainty = Uncertainty()
    return flow_map
