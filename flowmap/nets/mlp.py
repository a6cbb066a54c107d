"""A residual perceptron for points and toy data sets; samples of any shape are flattened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import Cycles, Depth, Width, check_ranges
from flowmap.base.schema import added
from flowmap.flow.policy import mean_velocity
from flowmap.nets.embed import Conditioning, ExtraCondition
from flowmap.nets.policy import Points, repeated
from flowmap.nets.prediction import as_velocity, check_prediction


@dataclass(frozen=True)
class MLP:
    """Settings of a residual perceptron.

    prediction: what its output is, the mean "velocity" or the "data" (prediction.py). points: the number of outputs;
    two or more are a policy (flow/policy.py), for objective pi_flow.
    """

    width: Width = 128
    depth: Depth = 3
    cycles: Cycles = 4.0
    prediction: str = added("velocity")
    points: Points = added(1)
    takes_extra_conditions: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        check_prediction(self.prediction)

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
        self.prediction, self.points, size = spec.prediction, spec.points, math.prod(shape)
        self.enter = nn.Linear(size, spec.width)
        options: dict[str, Any] = dict(num_classes=num_classes, arrival=arrival, guidance=guidance)
        self.conditioning = Conditioning(spec.width, cycles=spec.cycles, extra_conditions=extra_conditions, **options)
        self.blocks = nn.ModuleList(Block(spec.width) for _ in range(spec.depth))
        self.leave = nn.Linear(spec.width, self.points * size)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        if self.points > 1:
            return mean_velocity(self.policy(x, t, s, cond), t, s)
        return as_velocity(self.prediction, self._output(x, t, s, cond).reshape(x.shape), x, t)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        """The velocities (B, points, *shape) of the policy."""
        out = self._output(x, t, s, cond).reshape(len(x), self.points, *x.shape[1:])
        return as_velocity(self.prediction, out, x.unsqueeze(1), t)

    def with_points(self, points: int) -> MLPNet:
        """The same network with that many equal outputs."""
        return repeated(self, points)

    def _output(self, x: Tensor, t: Tensor, s: Tensor, cond) -> Tensor:
        c = F.silu(self.conditioning(t, s, cond))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        return self.leave(F.silu(h))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.shift = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(F.silu(h)) + self.shift(c)))
