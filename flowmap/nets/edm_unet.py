"""The U-Nets of EDM: DDPM++, NCSN++ and ADM.

Sources: Song et al. 2021, arXiv:2011.13456 (DDPM++, NCSN++); Dhariwal and Nichol 2021, arXiv:2105.05233 (ADM).
Written from the papers and EDM's tables 6 to 8 (arXiv:2206.00364); layers have the names of the published weights. A
layer called NxN_... runs at resolution N x N; `enc` is the encoder, `dec` the decoder, and each `block` of the decoder
takes one skip connection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Family:
    """Settings that all blocks of a network share.

    adaptive: the embedding scales and shifts after the second normalisation; otherwise it is added before it. head:
    channels per attention head, None for a single head. scale: the factor of each residual sum. projected: whether a
    skip that changes the resolution has a 1x1 convolution. taps: of the resampling filter. dropout: before each
    block's second convolution, in training only.
    """

    adaptive: bool
    head: int | None
    scale: float
    eps: float
    projected: bool
    taps: tuple[int, ...] = (1, 1)
    dropout: float = 0.0


SONG = Family(adaptive=False, head=None, scale=math.sqrt(0.5), eps=1e-6, projected=True)
DHARIWAL = Family(adaptive=True, head=64, scale=1.0, eps=1e-5, projected=False)


class UNet(nn.Module):
    """U(x, noise, labels, extra) for x (B, C, side, side) and noise (B,).

    labels are (B, num_labels) or None, extra is (B, width) or None.
    A subclass defines the embedding of noise, labels and extra, and the layers after the last block.
    """

    map_layer1: nn.Linear  # the last layer of the embedding

    def __init__(
        self,
        size,
        channels,
        multipliers,
        num_blocks,
        attention_at,
        family: Family,
        *,
        first: int,
        residual: bool = False,
    ):
        super().__init__()
        levels = [(size[1] >> level, channels * m) for level, m in enumerate(multipliers)]
        block = partial(Block, emb=4 * channels, family=family)
        self.activation_checkpointing = False
        taps = family.taps if residual else None
        self.enc, skips = _encoder(levels, size[0], first, block, num_blocks, attention_at, taps)
        self.dec = _decoder(levels, skips, block, num_blocks, attention_at, every=family.head is not None)
        self.out_channels = levels[0][1]

    def embedding(self, noise: Tensor, labels: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def last(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None, extra: Tensor | None) -> Tensor:
        emb = self.embedding(noise, labels, extra, x.dtype)
        skips: list[Tensor] = []
        past = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = past = (x + layer(past)) * math.sqrt(0.5)
                continue
            x = layer(x) if name.endswith("_conv") else self._run(layer, x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_aux_" in name:
                continue
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            x = self._run(layer, x, emb)
        return self.last(x)

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)


def _encoder(levels, inside: int, first: int, block, num_blocks: int, attention_at, taps):
    """The encoder's layers, and the channels of each skip connection.

    levels: (resolution, channels) of each level, from the finest. inside: the sample's channels. first: those of the
    first convolution. taps: of the filter on the residual path parallel to the blocks, None without that path.
    """
    enc, skips, past, now = nn.ModuleDict(), [], inside, first
    for level, (side, width) in enumerate(levels):
        if level == 0:
            enc[f"{side}x{side}_conv"] = Conv(inside, first, 3)
        else:
            enc[f"{side}x{side}_down"] = block(now, now, way="down")
            if taps is not None:
                enc[f"{side}x{side}_aux_residual"] = ThenDown(past, now, taps)
                past = now
        skips.append(now)
        for i in range(num_blocks):
            enc[f"{side}x{side}_block{i}"] = block(now, width, attention=side in attention_at)
            now = width
            skips.append(now)
    return enc, skips


def _decoder(levels, skips: list[int], block, num_blocks: int, attention_at, *, every: bool) -> nn.ModuleDict:
    """The decoder's layers, from the coarsest level.

    skips: the channels of the skip connections. every: whether all blocks at the resolutions of attention_at have
    attention, or only the last of each level.
    """
    dec, left, now = nn.ModuleDict(), list(skips), skips[-1]
    for level, (side, width) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            dec[f"{side}x{side}_in0"] = block(now, now, attention=True)
            dec[f"{side}x{side}_in1"] = block(now, now)
        else:
            dec[f"{side}x{side}_up"] = block(now, now, way="up")
        for i in range(num_blocks + 1):
            attention = side in attention_at and (every or i == num_blocks)
            dec[f"{side}x{side}_block{i}"] = block(now + left.pop(), width, attention=attention)
            now = width
    return dec


class SongUNet(UNet):
    """DDPM++; with ncsnpp NCSN++, which has a residual path parallel to the encoder's blocks."""

    def __init__(
        self,
        size,
        channels,
        multipliers,
        num_blocks,
        attention_at,
        num_labels: int | None,
        *,
        ncsnpp: bool,
        dropout: float,
    ):
        family = replace(SONG, taps=(1, 3, 3, 1) if ncsnpp else SONG.taps, dropout=dropout)
        super().__init__(size, channels, multipliers, num_blocks, attention_at, family, first=channels, residual=ncsnpp)
        noise = 2 * channels if ncsnpp else channels
        self.map_noise = Fourier(noise) if ncsnpp else Positional(noise, last=channels // 2 - 1)
        self.map_label = nn.Linear(num_labels, noise) if num_labels else None
        self.map_layer0 = nn.Linear(noise, 4 * channels)
        self.map_layer1 = nn.Linear(4 * channels, 4 * channels)
        side = f"{size[1]}x{size[1]}"
        self.dec[f"{side}_aux_norm"] = norm(self.out_channels, SONG.eps)
        self.dec[f"{side}_aux_conv"] = Conv(self.out_channels, size[0], 3)
        self.ends = (f"{side}_aux_norm", f"{side}_aux_conv")
        self._draw()

    def _draw(self) -> None:
        """Initialise weights by Xavier's uniform rule, near zero at the end of residual branches; biases are zero."""
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                last = name.endswith(("conv1", "proj", "aux_conv"))
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(layer.weight, gain)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def embedding(self, noise, labels, extra, dtype):
        cos, sin = self.map_noise(noise).to(dtype).chunk(2, 1)
        emb = torch.cat([sin, cos], 1)
        if self.map_label is not None:
            emb = emb + self.map_label(labels * math.sqrt(labels.shape[1]))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if extra is None else emb + extra.to(emb.dtype))

    def last(self, x):
        before, conv = (self.dec[name] for name in self.ends)
        return conv(F.silu(before(x)))


class DhariwalUNet(UNet):
    """ADM: the embedding scales and shifts, and attention heads have 64 channels."""

    def __init__(
        self, size, channels, multipliers, num_blocks, attention_at, num_labels: int | None, *, dropout: float
    ):
        family = replace(DHARIWAL, dropout=dropout)
        super().__init__(size, channels, multipliers, num_blocks, attention_at, family, first=channels * multipliers[0])
        self.map_noise = Positional(channels, last=channels // 2)
        self.map_layer0 = nn.Linear(channels, 4 * channels)
        self.map_layer1 = nn.Linear(4 * channels, 4 * channels)
        self.map_label = nn.Linear(num_labels, 4 * channels, bias=False) if num_labels else None
        self.out_norm = norm(self.out_channels, DHARIWAL.eps)
        self.out_conv = Conv(self.out_channels, size[0], 3)
        self._draw()

    def _draw(self) -> None:
        """Keep torch's initial weights, but zero at the end of residual branches and standard normal for classes."""
        for name, layer in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv")):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embedding(self, noise, labels, extra, dtype):
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise).to(dtype))))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        return F.silu(emb if extra is None else emb + extra.to(emb.dtype))

    def last(self, x):
        return self.out_conv(F.silu(self.out_norm(x)))


class Block(nn.Module):
    """Two convolutions with the embedding between them, in a residual sum, then optional attention in another."""

    def __init__(
        self, inside: int, out: int, emb: int, family: Family, *, way: str | None = None, attention: bool = False
    ):
        super().__init__()
        self.adaptive, self.scale, self.dropout = family.adaptive, family.scale, family.dropout
        self.heads = 0 if not attention else 1 if family.head is None else out // family.head
        self.norm0 = norm(inside, family.eps)
        self.conv0 = Conv(inside, out, 3, way, family.taps)
        self.affine = nn.Linear(emb, 2 * out if family.adaptive else out)
        self.norm1 = norm(out, family.eps)
        self.conv1 = Conv(out, out, 3)
        self.skip: Conv | Resized | None = None
        if inside != out or (way and family.projected):
            self.skip = Conv(inside, out, 1, way, family.taps)
        elif way:
            self.skip = Resized(way, family.taps)
        self.norm2 = norm(out, family.eps) if attention else None
        self.qkv = Conv(out, 3 * out, 1) if attention else None
        self.proj = Conv(out, out, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(y.dtype)
        if self.adaptive:
            scale, shift = modulation.chunk(2, 1)
            y = self.norm1(y) * (scale + 1) + shift
        else:
            y = self.norm1(y + modulation)
        y = F.silu(y)
        y = self.conv1(F.dropout(y, self.dropout) if self.training and self.dropout else y)
        x = (y + (x if self.skip is None else self.skip(x))) * self.scale
        return (self._attend(x) + x) * self.scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        assert self.qkv is not None and self.norm2 is not None and self.proj is not None
        qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # each (B, heads, places, c / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        # contiguous: torch's forward mode of the next normalisation needs it
        return self.proj(y.transpose(-1, -2).contiguous().reshape(b, c, height, width))


class Conv(nn.Conv2d):
    """A convolution, optionally after doubling ("up") or halving ("down") the resolution."""

    resample_filter: Tensor | None

    def __init__(self, inside: int, out: int, kernel: int, way: str | None = None, taps: tuple[int, ...] = (1, 1)):
        super().__init__(inside, out, kernel, padding=kernel // 2)
        self.way = way
        self.register_buffer("resample_filter", square_filter(taps) if way else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.way is None:
            return super().forward(x)
        assert self.resample_filter is not None
        return super().forward(resized(x, self.resample_filter, self.way))


class ThenDown(nn.Conv2d):
    """A 3x3 convolution with enough padding, then downsampling by 2; the two commute except for the padding."""

    resample_filter: Tensor

    def __init__(self, inside: int, out: int, taps: tuple[int, ...]):
        super().__init__(inside, out, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", square_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resized(super().forward(x), self.resample_filter, "down", padding=0)


class Resized(nn.Module):
    """Upsampling or downsampling by 2, without weights."""

    resample_filter: Tensor

    def __init__(self, way: str, taps: tuple[int, ...]):
        super().__init__()
        self.way = way
        self.register_buffer("resample_filter", square_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resized(x, self.resample_filter, self.way)


def square_filter(taps: tuple[int, ...]) -> Tensor:
    """The outer product of the taps with themselves, normalised to sum 1, (1, 1, n, n)."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (row[:, None] * row / row.sum() ** 2)[None, None]


def resized(x: Tensor, kernel: Tensor, way: str, padding: int | None = None) -> Tensor:
    """x (B, C, H, W) upsampled or downsampled by 2 with a depthwise filter."""
    channels = x.shape[1]
    padding = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    kernel = kernel.to(x.dtype).expand(channels, 1, -1, -1)
    if way == "up":
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or fewer, so that each has at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Positional(nn.Module):
    """cos and sin of x 10000^(-i / last), i = 0 .. num / 2 - 1, in float32 or better: (B,) -> (B, num)."""

    def __init__(self, num: int, *, last: int):
        super().__init__()
        self.num, self.last = num, last

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        octaves = torch.arange(self.num // 2, dtype=wide, device=x.device) / self.last
        angle = x.to(wide)[:, None] * 10000.0**-octaves
        return torch.cat([angle.cos(), angle.sin()], 1)


class Fourier(nn.Module):
    """cos and sin of 2 pi f x with fixed random frequencies f of std 16: (B,) -> (B, num)."""

    freqs: Tensor

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num // 2))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = x.to(wide)[:, None] * (2 * math.pi * self.freqs.to(wide))
        return torch.cat([angle.cos(), angle.sin()], 1)
