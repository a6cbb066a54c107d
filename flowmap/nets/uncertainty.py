"""A branch of the student that predicts its error for given times. It trains with the student and is not saved with it.

Source: EDM2, arXiv:2312.02696, which uses a linear layer on Fourier features of the noise level; here the input are
both times, with one hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmap.base.precision import without_autocast
from flowmap.nets.embed import ScalarEmbedding
from flowmap.nets.flow_map import FlowMapNet


class Uncertainty(nn.Module):
    """u(t, s), (B,), for t and s (B,), in float32 or better, also under autocast; initially 0."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.departure, self.interval = ScalarEmbedding(width), ScalarEmbedding(width)
        self.leave = nn.Linear(width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        with without_autocast(t.device):
            hidden = nn.functional.silu(self.departure(t) + self.interval(t - s))
            return self.leave(hidden.to(self.leave.weight.dtype)).squeeze(-1)


def with_uncertainty(flow_map: FlowMapNet, seed: int) -> FlowMapNet:
    """Add the branch to the student, with weights that depend on the seed only, and return the student."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow_map.uncertainty = Uncertainty()
    return flow_map
