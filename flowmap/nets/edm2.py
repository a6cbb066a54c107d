"""The EDM2 U-Net: every operation preserves the magnitude of its activations, and weights are normalised when used.

Source: Karras et al. 2024, arXiv:2312.02696 (configuration G; table 1 and appendix B for the constants). Layers have
the names of the published weights, so that these load unchanged. The preconditioning is EDM's, on our clock; arrival
and guidance branches, which start at zero, are added to the embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowmap.base.ranges import BelowOne, Depth, Multiplier, Positive, Side, Width, check_ranges
from flowmap.base.schema import added
from flowmap.nets.embed import ExtraCondition, ExtraEmbeddings, ScalarEmbedding, branches
from flowmap.nets.preconditioning import noise_level, one_hot, velocity_of
from flowmap.nets.time_embedding import CosineEmbedding, fitted

TIMES = ("log_sigma", "t")
PRESETS = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}


@dataclass(frozen=True)
class EDM2:
    """Settings of an EDM2 U-Net; the preset defines the channels unless they are given.

    sigma_data: the data's std, 0.5 in the published models. dropout: in training only; EDM2 used 0.1 for its larger
    networks. time_embedding: what the network embeds, "log_sigma" as published or "t" (nets/time_embedding.py).
    """

    preset: str = "S"
    channels: Width | None = None
    multipliers: tuple[Multiplier, ...] = (1, 2, 3, 4)
    num_blocks: Depth = 3
    attention_at: tuple[Side, ...] = (16, 8)
    sigma_data: Positive = 0.5
    dropout: BelowOne = 0.0
    time_embedding: str = added("log_sigma")
    takes_extra_conditions: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        if not self.multipliers:
            raise ValueError("multipliers: () must have at least one entry")
        if self.time_embedding not in TIMES:
            raise ValueError(f"time_embedding: {self.time_embedding!r} is not one of {', '.join(TIMES)}")

    @property
    def embeds_t(self) -> bool:
        return self.time_embedding == "t"

    def embedding_t(self) -> EDM2:
        """The settings of the same network with an embedding of t."""
        return replace(self, time_embedding="t")

    @property
    def width(self) -> int:
        return PRESETS[self.preset] if self.channels is None else self.channels

    def build(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        arrival: bool = True,
        guidance: bool = False,
        extra_conditions: Sequence[ExtraCondition] = (),
    ) -> nn.Module:
        halvings = 2 ** (len(self.multipliers) - 1)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % halvings:
            levels = len(self.multipliers)
            raise ValueError(f"multipliers: {levels} levels do not halve a square sample of shape {tuple(shape)}")
        return EDM2Net(self, shape, num_classes, arrival, guidance, extra_conditions)


class EDM2Net(nn.Module):
    """F(x, t, s, cond) for x (B, C, H, H), the velocity of preconditioning.py. A class of -1 is no class."""

    def __init__(
        self,
        spec: EDM2,
        shape: tuple[int, int, int],
        num_classes: int | None,
        arrival: bool,
        guidance: bool,
        extra_conditions: Sequence[ExtraCondition] = (),
    ):
        super().__init__()
        self.sigma_data, self.num_classes = spec.sigma_data, num_classes
        self.unet = UNet(spec, shape, num_classes or 0)
        width = self.unet.emb_width
        self.arrival = ScalarEmbedding(width, silent=True) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None
        self.further = ExtraEmbeddings(extra_conditions, width) if extra_conditions else None

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        cond = cond or {}
        labels, extra = one_hot(x, cond, self.num_classes), branches(self.arrival, self.guidance, t, s, cond)
        if self.further is not None:
            extra = self.further(cond) + (0 if extra is None else extra)
        unet = lambda scaled, noise: self.unet(scaled, t if self.embeds_t else noise, labels, extra)
        return velocity_of(unet, x, t, self.sigma_data)

    @property
    def embeds_t(self) -> bool:
        return self.unet.emb_time is not None

    def with_embedding_of_t(self) -> EDM2Net:
        """The same network with an embedding of t fitted to that of log-sigma; the other modules are shared."""
        net = copy.copy(self)
        net._modules = {**self._modules, "unet": self.unet.with_embedding_of_t()}
        return net

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the encoder and the decoder in order."""
        return [layer for layer in (*self.unet.enc.values(), *self.unet.dec.values()) if isinstance(layer, Block)]

    @property
    def activation_checkpointing(self) -> bool:
        return self.unet.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.unet.activation_checkpointing = on


class UNet(nn.Module):
    """U(x, time, labels, extra): encoder and decoder with skips; `extra` (B, width) is added to the embedding.

    time (B,) is log(sigma) / 4, as in the published networks, or t itself.
    """

    emb_time: CosineEmbedding | None
    emb_fourier: Fourier | None
    emb_noise: Conv | None

    def __init__(self, spec: EDM2, shape: tuple[int, int, int], num_labels: int):
        super().__init__()
        channels, size, _ = shape
        widths = [spec.width * m for m in spec.multipliers]
        levels = [(size >> level, width) for level, width in enumerate(widths)]
        self.emb_width = emb = max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.register_module("emb_time", CosineEmbedding(emb) if spec.embeds_t else None)
        self.register_module("emb_fourier", None if spec.embeds_t else Fourier(widths[0]))
        self.register_module("emb_noise", None if spec.embeds_t else Conv(widths[0], emb, ()))
        self.emb_label = Conv(num_labels, emb, ()) if num_labels else None
        self.activation_checkpointing = False
        self.enc, skips = _encoder(spec, levels, channels, emb)
        self.dec = _decoder(spec, levels, skips, emb)
        self.out_conv = Conv(widths[0], channels, (3, 3))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None, extra: Tensor | None) -> Tensor:
        emb = self._embedding(time, x.dtype)
        if self.emb_label is not None:
            assert labels is not None
            emb = blend(emb, self.emb_label(labels * math.sqrt(labels.shape[1])), 0.5)
        emb = silu(emb if extra is None else emb + extra.to(emb.dtype))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else self._run(block, x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = joined(x, skips.pop())
            x = self._run(block, x, emb)
        return self.out_conv(x, self.out_gain)

    def _embedding(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        if self.emb_time is not None:
            return self.emb_time(time).to(dtype)
        assert self.emb_fourier is not None and self.emb_noise is not None
        return self.emb_noise(self.emb_fourier(time).to(dtype))

    def with_embedding_of_t(self) -> UNet:
        unet = copy.copy(self)
        new = fitted(lambda t: self._embedding(noise_level(t), t.dtype), self.emb_width)
        unet._modules = {**self._modules, "emb_time": new, "emb_fourier": None, "emb_noise": None}
        return unet

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)


def _encoder(spec: EDM2, levels: list[tuple[int, int]], channels: int, emb: int) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's layers, and the channels of each of their outputs.

    levels: (resolution, channels) of each level, from the finest. emb: the width of the embedding.
    """
    block = partial(Block, decoder=False, dropout=spec.dropout)
    enc, skips = nn.ModuleDict(), []
    now = channels + 1  # a channel of ones is the only bias
    for level, (side, width) in enumerate(levels):
        if level == 0:
            enc[f"{side}x{side}_conv"] = Conv(now, width, (3, 3))
            now = width
        else:
            enc[f"{side}x{side}_down"] = block(now, now, emb, resample="down")
        skips.append(now)
        for i in range(spec.num_blocks):
            enc[f"{side}x{side}_block{i}"] = block(now, width, emb, attention=side in spec.attention_at)
            now = width
            skips.append(now)
    return enc, skips


def _decoder(spec: EDM2, levels: list[tuple[int, int]], skips: list[int], emb: int) -> nn.ModuleDict:
    """The decoder's layers, from the coarsest level; skips: the channels of the encoder's outputs."""
    block = partial(Block, decoder=True, dropout=spec.dropout)
    dec, left, now = nn.ModuleDict(), list(skips), skips[-1]
    for level, (side, width) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            dec[f"{side}x{side}_in0"] = block(now, now, emb, attention=True)
            dec[f"{side}x{side}_in1"] = block(now, now, emb)
        else:
            dec[f"{side}x{side}_up"] = block(now, now, emb, resample="up")
        for i in range(spec.num_blocks + 1):
            dec[f"{side}x{side}_block{i}"] = block(now + left.pop(), width, emb, attention=side in spec.attention_at)
            now = width
    return dec


class Block(nn.Module):
    """Two convolutions with the embedding between them, then optional attention; sums preserve the magnitude."""

    def __init__(
        self,
        inside: int,
        out: int,
        emb: int,
        *,
        decoder: bool,
        dropout: float,
        resample: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.dropout = dropout
        self.decoder, self.resample, self.heads = decoder, resample, out // 64 if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Conv(inside if decoder else out, out, (3, 3))
        self.emb_linear = Conv(emb, out, ())
        self.conv_res1 = Conv(out, out, (3, 3))
        self.conv_skip = Conv(inside, out, (1, 1)) if inside != out else None
        self.attn_qkv = Conv(out, 3 * out, (1, 1)) if attention else None
        self.attn_proj = Conv(out, out, (1, 1)) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if not self.decoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = unit(x, 1)
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = silu(self.conv_res0(silu(x)) * scale[:, :, None, None].to(x.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout) if self.training and self.dropout else y)
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = blend(x, y, 0.3)
        if self.heads:
            x = blend(x, self._attend(x), 0.3)
        return x.clamp(-256, 256)

    def _attend(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        assert self.attn_qkv is not None and self.attn_proj is not None
        qkv = self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = unit(qkv, 2).permute(3, 0, 1, 4, 2).unbind(0)  # each (B, heads, places, c / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(y.transpose(-1, -2).reshape(b, c, height, width))


class Conv(nn.Module):
    """A convolution (a linear layer for kernel ()) without bias, with filters that are normalised when used.

    folded: the weights are the filters themselves, gain included (`fold_filters`).
    """

    folded = False

    def __init__(self, inside: int, out: int, kernel: tuple[int, ...]):
        super().__init__()
        self.out_channels = out
        self.weight = nn.Parameter(torch.randn(out, inside, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = (self.weight if self.folded else self.filters(gain)).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    def filters(self, gain: Tensor | float) -> Tensor:
        """The weights as they are used, in float32 or better."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return unit(w) * (gain / math.sqrt(w[0].numel()))


@torch.no_grad()
def fold_filters(net: nn.Module) -> None:
    """Replace the frozen weights of all layers by their filters, so that calls do not normalise them.

    The output is the same to the bit; a state dict of the network is then no longer that of EDM2.
    """
    gains = {id(block.emb_linear): block.emb_gain for block in net.modules() if isinstance(block, Block)}
    gains |= {id(unet.out_conv): unet.out_gain for unet in net.modules() if isinstance(unet, UNet)}
    for layer in net.modules():
        if isinstance(layer, Conv) and not layer.folded and not layer.weight.requires_grad:
            layer.weight.data = layer.filters(gains.get(id(layer), 1.0))
            layer.folded = True


class Fourier(nn.Module):
    """sqrt(2) cos(2 pi (f x + phase)) with fixed random frequencies and phases: (B,) -> (B, num)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.cos(x.to(wide)[:, None] * self.freqs.to(wide) + self.phases.to(wide)) * math.sqrt(2)


def unit(x: Tensor, dim: int | None = None, eps: float = 1e-4) -> Tensor:
    """x scaled to root mean square 1 over dim, by default over all dimensions except the first."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
    share = 1 / math.prod([x.shape[d] for d in dims])
    return x / (norm * math.sqrt(share) + eps).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU scaled to keep the magnitude of standard normal inputs."""
    return F.silu(x) / 0.596


def blend(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b in the dtype of a, scaled to keep the magnitude."""
    return torch.lerp(a, b.to(a.dtype), share) / math.hypot(1 - share, share)


def joined(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """a and b concatenated along the channels, weighted by 1 - share and share, with the magnitude preserved."""
    total = a.shape[1] + b.shape[1]
    scale = math.sqrt(total / ((1 - share) ** 2 + share**2))
    weights = (scale * (1 - share) / math.sqrt(a.shape[1]), scale * share / math.sqrt(b.shape[1]))
    return torch.cat([a * weights[0], b * weights[1]], 1)
