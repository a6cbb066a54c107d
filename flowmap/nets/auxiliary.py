"""The auxiliary model of a learned prior: an encoder from samples to a code z, and a decoder of z.

Source: LeDiFlow (Zwick et al. 2025, arXiv:2505.20723). The paper does not publish its networks, so sizes are settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import Depth, Heads, Range, Ratio, Width, check_ranges
from flowmap.nets.dit import Block, sine_positions


@dataclass(frozen=True)
class _Auxiliary:
    """Settings of all auxiliary models.

    size: the dimension of a code. log_variance: bounds of the decoder's log-variance, applied smoothly, as
    mid + half tanh((raw - mid) / half).
    """

    size: Width = 8
    log_variance: tuple[Annotated[float, Range(-50, 50)], Annotated[float, Range(-50, 50)]] = (-6.0, 2.0)
    artifact: ClassVar[str] = "prior"

    def __post_init__(self):
        check_ranges(self)
        if not self.log_variance[0] < self.log_variance[1]:
            raise ValueError(f"log_variance: {self.log_variance} must be an increasing pair of numbers")


@dataclass(frozen=True)
class ConvPrior(_Auxiliary):
    """Residual convolutions; each entry of `channels` after the first halves height and width in the encoder."""

    channels: tuple[Width, ...] = (32, 64)
    groups: Width = 8

    def __post_init__(self):
        super().__post_init__()
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels: {self.channels} must be multiples of groups ({self.groups})")

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = False, guidance: bool = False
    ) -> nn.Module:
        if len(shape) != 3 or any(side % 2 ** (len(self.channels) - 1) for side in shape[1:]):
            raise ValueError(f"channels: {len(self.channels)} levels do not halve a sample of shape {tuple(shape)}")
        return AuxiliaryNet(self, _ConvEncoder(self, shape), _ConvDecoder(self, shape))


@dataclass(frozen=True)
class TransformerPrior(_Auxiliary):
    """Transformer blocks over patches; z modulates those of the decoder."""

    width: Width = 96
    depth: Depth = 3
    heads: Heads = 3
    patch: Annotated[int, Range(1, 1024)] = 2
    mlp_ratio: Ratio = 8 / 3

    def __post_init__(self):
        super().__post_init__()
        if self.width % (4 * self.heads):
            raise ValueError(f"width: {self.width} is not a multiple of 4 x heads ({self.heads})")

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = False, guidance: bool = False
    ) -> nn.Module:
        if len(shape) != 3 or shape[1] % self.patch or shape[2] % self.patch:
            what = f"a sample of shape {tuple(shape)} (channels, height, width)"
            raise ValueError(f"patch: {self.patch} does not divide {what}")
        return AuxiliaryNet(self, _TokenEncoder(self, shape), _TokenDecoder(self, shape))


class AuxiliaryNet(nn.Module):
    """The auxiliary model as a module; calling it decodes the posterior's mean and returns the mean of x1.

    encode: x0 (B, C, H, W) -> (mean, log-variance) of z, each (B, size). decode: z -> (mean, log-variance) of x1, each
    (B, C, H, W).
    """

    def __init__(self, spec: _Auxiliary, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        low, high = spec.log_variance
        self.size, self.middle, self.reach = spec.size, (low + high) / 2, (high - low) / 2
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, 10 * torch.tanh(logvar / 10)  # bounded, so that exp cannot overflow after the first step

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.decoder(z).chunk(2, 1)
        return mean, self.middle + self.reach * torch.tanh((raw - self.middle) / self.reach)

    def forward(self, x: Tensor, t: Tensor | None = None, s: Tensor | None = None, cond=None) -> Tensor:
        return self.decode(self.encode(x)[0])[0]


class _ConvEncoder(nn.Sequential):
    def __init__(self, spec: ConvPrior, shape: tuple[int, ...]):
        first, last, halvings = spec.channels[0], spec.channels[-1], len(spec.channels) - 1
        layers: list[nn.Module] = [nn.Conv2d(shape[0], first, 3, padding=1), _Residual(first, spec.groups)]
        for here, there in zip(spec.channels, spec.channels[1:], strict=False):
            layers += [nn.Conv2d(here, there, 3, stride=2, padding=1), _Residual(there, spec.groups)]
        size = last * (shape[1] >> halvings) * (shape[2] >> halvings)
        super().__init__(
            *layers, nn.GroupNorm(spec.groups, last), nn.SiLU(), nn.Flatten(), nn.Linear(size, 2 * spec.size)
        )


class _ConvDecoder(nn.Sequential):
    def __init__(self, spec: ConvPrior, shape: tuple[int, ...]):
        first, last, halvings = spec.channels[0], spec.channels[-1], len(spec.channels) - 1
        small = (last, shape[1] >> halvings, shape[2] >> halvings)
        layers: list[nn.Module] = [
            nn.Linear(spec.size, last * small[1] * small[2]),
            nn.Unflatten(1, small),
            _Residual(last, spec.groups),
        ]
        for here, there in zip(spec.channels[::-1], spec.channels[-2::-1], strict=False):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(here, there, 3, padding=1), _Residual(there, spec.groups)]
        super().__init__(
            *layers, nn.GroupNorm(spec.groups, first), nn.SiLU(), nn.Conv2d(first, 2 * shape[0], 3, padding=1)
        )


class _Residual(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        norms = (nn.GroupNorm(groups, channels) for _ in range(2))
        convs = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        parts = (part for norm, conv in zip(norms, convs, strict=True) for part in (norm, nn.SiLU(), conv))
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _TokenEncoder(nn.Module):
    def __init__(self, spec: TransformerPrior, shape: tuple[int, ...]):
        super().__init__()
        self.enter = nn.Conv2d(shape[0], spec.width, spec.patch, stride=spec.patch)
        self.position = nn.Parameter(sine_positions(shape[1] // spec.patch, shape[2] // spec.patch, spec.width))
        self.modulation = nn.Parameter(0.02 * torch.ones(1, spec.width))  # a learned vector gates the blocks
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.leave = nn.Linear(spec.width, 2 * spec.size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).flatten(2).transpose(1, 2) + self.position
        c = self.modulation + x.new_zeros(len(x), 1)
        for block in self.blocks:
            h = block(h, c)
        return self.leave(F.rms_norm(h, (h.shape[-1],), eps=1e-6).mean(1))


class _TokenDecoder(nn.Module):
    def __init__(self, spec: TransformerPrior, shape: tuple[int, ...]):
        super().__init__()
        rows, columns = shape[1] // spec.patch, shape[2] // spec.patch
        self.rows = rows
        self.position = nn.Parameter(sine_positions(rows, columns, spec.width))
        self.enter = nn.Linear(spec.size, spec.width)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.leave = nn.ConvTranspose2d(spec.width, 2 * shape[0], spec.patch, stride=spec.patch)

    def forward(self, z: Tensor) -> Tensor:
        c = self.enter(z)
        h = self.position + c.unsqueeze(1)
        for block in self.blocks:
            h = block(h, F.silu(c))
        return self.leave(F.rms_norm(h, (h.shape[-1],), eps=1e-6).transpose(1, 2).unflatten(2, (self.rows, -1)))
