"""A teacher from one of our networks: its frozen instantaneous velocity F(x, t, t)."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from flowmap.flow.types import Cond, FlowMap


class FlowMapModule(FlowMap, Protocol):
    """A flow map that is a torch.nn.Module.

    empty: the conditions that it uses where a call gives none, one row each.
    """

    @property
    def empty(self) -> Cond: ...

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

    def joined(self, first: Cond, second: Cond | None, rows: int) -> Cond | None:
        """The conditions of two batches of so many rows, one after the other; None if they do not have the same form.

        Conditions that a call does not give are those of an empty text, as the network itself takes them.
        """
        empty = {key: row.expand(rows, *row.shape[1:]) for key, row in self.flow_map.empty.items()}
        one, other = {**empty, **first}, {**empty, **(second or {})}
        if one.keys() != other.keys() or any(_form(one[key]) != _form(other[key]) for key in one):
            return None
        return {key: torch.cat([one[key], other[key]]) for key in one}

    def to(self, device) -> NetworkTeacher:
        self.flow_map.to(device)
        return self


def _form(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device
