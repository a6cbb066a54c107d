"""A teacher from one of our networks: its frozen instantaneous velocity F(x, t, t)."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from flowmap.flow.types import Cond, FlowMap


class FlowMapModule(FlowMap, Protocol):
    """A flow map that is a torch.nn.Module."""

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def to(self, device: torch.device | str) -> Self: ...


class NetworkTeacher:
    """A frozen network as a teacher. It is not a module: checkpoints of the student never contain the network."""

    network_calls = 1

    def __init__(self, flow_map: FlowMapModule):
        self.flow_map = flow_map.eval().requires_grad_(False)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        with torch.no_grad():
            return self.flow_map.mean_velocity(x, t, t, cond)

    def to(self, device) -> NetworkTeacher:
        self.flow_map.to(device)
        return self
