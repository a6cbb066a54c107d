"""Networks that give a policy (flow/policy.py): `points` outputs for each sample, whose mean is the mean velocity."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowmap.base.ranges import Range
from flowmap.flow.types import Cond

Points = Annotated[int, Range(1, 64)]


@runtime_checkable
class EmitsPolicy(Protocol):
    """A network with `points` outputs; 1 is a plain network."""

    points: int

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """The velocities u_k (B, points, ...)."""
        ...

    def with_points(self, points: int) -> nn.Module:
        """The same network with that many outputs, all equal to its own; the rest of its weights are shared."""
        ...


def repeated(net: Any, points: int) -> Any:
    """A copy of the network with a single output whose last layer, `leave`, gives it `points` times."""
    assert net.points == 1
    wide = copy.copy(net)
    wide._modules, wide.points = dict(net._modules), points
    wide.leave = nn.Linear(net.leave.in_features, points * net.leave.out_features, device="meta")
    with torch.no_grad():
        wide.leave.weight = nn.Parameter(net.leave.weight.repeat(points, 1))
        wide.leave.bias = nn.Parameter(net.leave.bias.repeat(points))
    return wide
