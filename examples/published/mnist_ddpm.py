"""The unconditional epsilon DDPM of MNIST by Charles-yueyue831, as a network for `--import`.

Weights: github: Charles-yueyue831/DDPM, commit d5fc506, model/ddpm_mnist.pth (Apache-2.0). A recipe names it by
`--import examples/published/mnist_ddpm.py` and `teacher: {kind: module, module: mnist-ddpm, ...}`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowmap

WIDTHS, SIDES, TIME = (10, 20, 40), (28, 14, 7), 40  # then 80 channels at 3x3
WEIGHTS = "mnist-ddpm/ddpm_mnist.pth"
SHA256 = "03c7b8ce7ed630b4751f83af3312efe8c779b92acb175883a1a2d524f84dd0b1"


@flowmap.module("mnist-ddpm")
class DDPM(nn.Module):
    """Predicted noise from x (B, 1, 28, 28) in [-1, 1] at the place t (B,) of 0 .. 999, which may lie between two.

    A U-Net of two blocks a level without attention. On the way up each block is given the output of its mirror image
    on the way down, which comes first.
    """

    def __init__(self):
        super().__init__()
        self.position_embedding = Sines(128)
        self.pe_linear = nn.Sequential(nn.Linear(128, TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        self.conv_in = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoders, self.ups = nn.ModuleList(), nn.ModuleList()
        before = WIDTHS[0]
        for width, side in zip(WIDTHS, SIDES, strict=True):
            self.encoders.append(nn.ModuleList([Level(before, width, side), Level(width, width, side)]))
            self.downs.append(nn.Conv2d(width, width, 2, stride=2))
            before = width
        self.mid = Middle(before, 2 * before, 3)
        for width, side in zip(reversed(WIDTHS), reversed(SIDES), strict=True):
            self.ups.append(nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            self.decoders.append(nn.ModuleList([Level(2 * width, width, side), Level(2 * width, width, side)]))
        self.conv_out = nn.Conv2d(WIDTHS[0], 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.pe_linear(self.position_embedding(t))
        x, skips = self.conv_in(x), []
        for level, down in zip(self.encoders, self.downs, strict=True):
            for block in level:
                x = block(x, time)
                skips.append(x)
            x = down(x)
        x = self.mid(x, time)
        for level, up in zip(self.decoders, self.ups, strict=True):
            x = up(x)
            missing = skips[-1].shape[-1] - x.shape[-1]
            x = F.pad(x, (0, missing, 0, missing))
            for block in level:
                x = block(torch.cat([skips.pop(), x], dim=1), time)
        return self.conv_out(F.silu(x))


class Sines(nn.Module):
    """(B, size): sines and cosines of the place in turn. The weights have them as a table, which stays as it is."""

    def __init__(self, size: int):
        super().__init__()
        self.embedding = nn.Embedding(1000, size).requires_grad_(False)

    def forward(self, t: Tensor) -> Tensor:
        half = self.embedding.embedding_dim // 2
        angles = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / half))
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class Block(nn.Module):
    def __init__(self, before: int, width: int, side: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm([before, side, side]), nn.LayerNorm([width, side, side])
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time_layer = nn.Linear(TIME, width)
        if before != width:
            self.residual_conv = nn.Conv2d(before, width, 1)
        self.changes = before != width

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x))) + self.time_layer(F.silu(time))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(inner))) + (self.residual_conv(x) if self.changes else x)


class Level(nn.Module):
    def __init__(self, before: int, width: int, side: int):
        super().__init__()
        self.res_block = Block(before, width, side)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.res_block(x, time)


class Middle(nn.Module):
    def __init__(self, before: int, width: int, side: int):
        super().__init__()
        self.res_block1, self.res_block2 = Block(before, width, side), Block(width, width, side)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.res_block2(self.res_block1(x, time), time)
