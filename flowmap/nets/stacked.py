"""Two networks in series as one: twice the weights and twice the depth of one step, as InstaFlow-1.7B's two U-Nets.

Source: Liu et al. 2023, arXiv:2309.06380 (its wiring is not published; ours composes two flow maps). Clock: 0 data, 1 noise.
The first takes x from t to m = (t + s) / 2, the second from there to s; the mean of their mean velocities is that of the whole:
    y = x + (m - t) F1(x, t, m),   F(x, t, s) = (F1(x, t, m) + F2(y, m, s)) / 2
At s = t nothing moves, so f(x, t, t) = x, and two copies of one network say there what that one says: F(x, t, t) = v(x, t). A stack that
starts as two copies of a teacher is its two Euler steps from t to s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from flowmap.flow.types import Cond, broadcast_time


@runtime_checkable
class NetSpec(Protocol):
    """The settings of a network, a dataclass: what `net` may be.

    A recipe may say from_teacher or from_recipe, which are resolved to one.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def build(self) -> Callable[..., nn.Module]:
        """build(shape, *, num_classes, arrival, guidance) makes the network of samples of that shape."""
        ...


@dataclass(frozen=True)
class Stacked:
    """Two networks of the settings `net`, with weights of their own; net may be from_teacher or from_recipe, whose weights both start with."""

    net: NetSpec

    def __post_init__(self):
        if isinstance(self.net, Stacked):
            raise ValueError("net: a stack is of two networks; one of stacks is not known")
        if getattr(self.net, "lora", None) is not None:
            raise ValueError("net.lora: a stack has weights of its own and no frozen base; leave it out")

    @property
    def holds_constants(self) -> bool:
        return getattr(self.net, "holds_constants", False)

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> StackedNet:
        net = partial(self.net.build, shape, num_classes=num_classes, arrival=arrival, guidance=guidance)
        return StackedNet(net(), net())


def stack_of(network: Callable[..., Any]) -> Callable[..., Stacked]:
    """What makes a stack of the settings of one of its networks: what an exported folder builds it by."""
    return lambda **settings: Stacked(network(**settings))


class StackedNet(nn.Module):
    """F(x, t, s, cond) for x (B, *shape)."""

    first: Any  # two networks of one kind
    second: Any

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        middle = (t + s) / 2
        one = self.first(x, t, middle, cond).to(x.dtype)
        other = self.second(x + (broadcast_time(middle - t, x) * one).to(x.dtype), middle, s, cond).to(x.dtype)
        return (one + other) / 2

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.first, self.second

    @property
    def blocks(self) -> list[nn.Module]:
        """What sharding and the like take one by one."""
        return [block for net in self.parts for block in getattr(net, "blocks", ())]

    @property
    def empty(self) -> Cond:
        """The conditions of an empty text, which both fill in; networks without text have no such attribute."""
        return self.first.empty

    @empty.setter
    def empty(self, rows: Cond) -> None:
        self.first.empty = self.second.empty = rows

    @property
    def activation_checkpointing(self) -> bool:
        return bool(self.first.activation_checkpointing)

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.first.activation_checkpointing = self.second.activation_checkpointing = on


def net_within(spec: Any) -> Any:
    """The settings of the network itself: of either of a stack, else those given."""
    return spec.net if isinstance(spec, Stacked) else spec
