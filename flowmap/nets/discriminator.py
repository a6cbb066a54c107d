"""Discriminators: D(x, cond, noise), one score per sample (B,), for x (B, C, H, W) in the student's sample space.

They read cond["class"] (B,) by projection (Miyato and Koyama 2018, arXiv:1802.05637): the score is <w, h> + <e_class,
h>, without the second term for class -1. No layer normalises over the batch, since gradient penalties need
independent rows. Everything runs in float32, even under autocast, since the penalties are differentiated twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.precision import without_autocast
from flowmap.base.ranges import Range, Width, check_ranges
from flowmap.flow.types import Cond


@dataclass(frozen=True)
class Conv:
    """A residual convolutional network.

    It halves height and width down to about 4, or `depth` times, and doubles its channels from width up to max_width.
    """

    width: Width = 32
    max_width: Width = 512
    depth: Annotated[int, Range(0, 1000)] | None = None
    trunk: ClassVar[str] = "none"

    def __post_init__(self):
        check_ranges(self)
        if self.max_width < self.width:
            raise ValueError(f"max_width: {self.max_width} must not be below width = {self.width}")

    def build(self, shape: tuple[int, ...], *, num_classes: int | None = None) -> nn.Module:
        check_shape(shape, "conv")
        return ConvNet(self, shape, num_classes)


class ConvNet(nn.Module):
    def __init__(self, spec: Conv, shape: tuple[int, ...], num_classes: int | None):
        super().__init__()
        side = min(shape[1:])
        depth = max(round(math.log2(side / 4)), 0) if spec.depth is None else spec.depth
        if side >> depth < 1:
            raise ValueError(f"depth: {depth} halvings are too many for a sample of shape {tuple(shape)}")
        widths = [min(spec.width << level, spec.max_width) for level in range(depth + 1)]
        self.enter = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(inside, out) for inside, out in zip([widths[0], *widths], widths, strict=False)
        )
        self.places = (shape[1] >> depth) * (shape[2] >> depth)
        self.mix = nn.Linear(widths[-1] * self.places, widths[-1])
        self.score = Projection(widths[-1], num_classes)
        keep_variance(self)

    def forward(self, x: Tensor, cond: Cond | None = None, noise: Tensor | None = None) -> Tensor:
        with without_autocast(x.device):
            h = self.enter(x.to(self.mix.weight.dtype))
            for i, block in enumerate(self.blocks):
                h = block(F.avg_pool2d(h, 2) if i else h)
            return self.score(F.silu(self.mix(h.flatten(1))), cond)


class Block(nn.Module):
    """Two convolutions with a skip connection, scaled to keep the variance."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(inside, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(inside, out, 1, bias=False) if inside != out else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return (self.skip(h) + self.second(F.silu(self.first(F.silu(h))))) * math.sqrt(0.5)


class Projection(nn.Module):
    """<w, h> + <e_class, h> for h (B, width): (B,)."""

    def __init__(self, width: int, num_classes: int | None):
        super().__init__()
        # no bias: the loss depends on differences of scores only, so a bias would drift
        self.straight = nn.Linear(width, 1, bias=False)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, h: Tensor, cond: Cond | None) -> Tensor:
        score = self.straight(h).squeeze(1)
        label = (cond or {}).get("class")
        if self.label is None or label is None:
            return score
        projected = (self.label(label.clamp(min=0)) * h).sum(1) / math.sqrt(h.shape[1])
        return score + torch.where(label >= 0, projected, torch.zeros_like(projected))


class Head(nn.Module):
    """The score (B,) of features of a frozen network, averaged over positions.

    Features are (B, C, H, W), (B, N, C) or (B, C).
    """

    def __init__(self, channels: int, width: int, num_classes: int | None):
        super().__init__()
        self.enter, self.mix = nn.Linear(channels, width), nn.Linear(width, width)
        self.score = Projection(width, num_classes)
        keep_variance(self)

    def forward(self, features: Tensor, cond: Cond | None) -> Tensor:
        h = by_place(features).to(self.enter.weight.dtype)
        h = F.silu(self.enter(F.layer_norm(h, (h.shape[-1],))))
        return self.score(F.silu(self.mix(h)).mean(1), cond)


def keep_variance(net: nn.Module) -> None:
    """Initialise weights by He et al. 2015 (arXiv:1502.01852), biases with 0, so that initial scores differ by row."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def by_place(features: Tensor) -> Tensor:
    """Features as (B, positions, channels)."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features if features.ndim == 3 else features.flatten(1).unsqueeze(1)


def channels_of(features: Tensor) -> int:
    return by_place(features).shape[-1]


def check_shape(shape: tuple[int, ...], kind: str) -> None:
    """Raise a ValueError unless samples are images or latents."""
    if len(shape) != 3:
        needs = "wants pictures or latents (channels, height, width)"
        raise ValueError(f"kind: {kind!r} {needs}, and the data's samples are {tuple(shape)}")
