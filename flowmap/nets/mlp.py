"""A residual perceptron for points and toy data sets; samples of any shape are flattened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import Cycles, Depth, Width, check_ranges
from flowmap.nets.embed import Conditioning, ExtraCondition


@dataclass(frozen=True)
class MLP:
    """Settings of a residual perceptron."""

    width: Width = 128
    depth: Depth = 3
    cycles: Cycles = 4.0
    takes_extra_conditions: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def build(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        arrival: bool = True,
        guidance: bool = False,
        extra_conditions: Sequence[ExtraCondition] = (),
    ) -> nn.Module:
        return MLPNet(self, shape, num_classes, arrival, guidance, extra_conditions)


class MLPNet(nn.Module):
    """F(x, t, s, cond) for x (B, *shape)."""

    def __init__(
        self,
        spec: MLP,
        shape: tuple[int, ...],
        num_classes: int | None,
        arrival: bool,
        guidance: bool,
        extra_conditions: Sequence[ExtraCondition] = (),
    ):
        super().__init__()
        size = math.prod(shape)
        self.enter = nn.Linear(size, spec.width)
        options: dict[str, Any] = dict(num_classes=num_classes, arrival=arrival, guidance=guidance)
        self.conditioning = Conditioning(spec.width, cycles=spec.cycles, extra_conditions=extra_conditions, **options)
        self.blocks = nn.ModuleList(Block(spec.width) for _ in range(spec.depth))
        self.leave = nn.Linear(spec.width, size)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        c = F.silu(self.conditioning(t, s, cond))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        return self.leave(F.silu(h)).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.shift = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(F.silu(h)) + self.shift(c)))
