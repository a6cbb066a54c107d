"""The embedding of an arrival time that is diffusers' own: HunyuanImage's `timestep_embedder_r` (use_meanflow).

That network embeds (departure + arrival) / 2, each by sinusoids of the time of its schedule and two layers. A student
of it adds this embedding of the arrival to that of the departure, which is the same with twice the weights of the last
layers: its export is the stock network with a second time, for any number of steps (export/stock.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.precision import without_autocast

FEATURES = 256
FASTEST = 25.0  # radians over the path, the fastest sinusoid that is read at first: those of 1,000 s are rough
SECOND_TIMES = ("HunyuanImageTransformer2DModel",)


class SecondTime(nn.Module):
    """An embedding of the schedule's time of arrival, (B,) -> (B, width), zero until it is trained.

    It is in float32 or better, also under autocast. unit: the schedule's time at noise.
    """

    def __init__(self, width: int, unit: float):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FEATURES, width), nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        with torch.no_grad():
            fast = unit * self.frequencies(self.linear_1.weight.device) > FASTEST
            self.linear_1.weight.masked_fill_(torch.cat([fast, fast]), 0.0)

    @staticmethod
    def frequencies(device: torch.device) -> Tensor:
        """Those of diffusers' Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)."""
        half = FEATURES // 2
        return torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=device) / half)

    def forward(self, time: Tensor) -> Tensor:
        with without_autocast(time.device):
            angle = time.float().unsqueeze(-1) * self.frequencies(time.device)
            waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.linear_1.weight.dtype)
            return self.linear_2(F.silu(self.linear_1(waves)))
