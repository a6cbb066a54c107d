"""The blocks of a network: the units in which its weights are gathered where they are sharded over devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class InBlocks(Protocol):
    """A network that states its blocks: modules that it calls as modules, in any order and any number of times."""

    @property
    def blocks(self) -> Iterable[nn.Module]: ...


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The network's blocks; empty if it states none."""
    return list(net.blocks) if isinstance(net, InBlocks) else []
