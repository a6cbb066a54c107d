"""Two networks in series as one network, with twice the weights and depth, as in InstaFlow-1.7B.

Source: Liu et al. 2023, arXiv:2309.06380 (its wiring is not published; ours composes two flow maps). Clock: 0 data, 1
noise. The first network maps x from t to m = (t + s) / 2, the second from m to s; the mean velocity of the whole is the
mean of theirs:
    y = x + (m - t) F1(x, t, m),   F(x, t, s) = (F1(x, t, m) + F2(y, m, s)) / 2
For s = t this gives f(x, t, t) = x, and two copies of one network give F(x, t, t) = v(x, t). Two copies of a teacher
are initially its two Euler steps from t to s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets.blocks import blocks_of


@runtime_checkable
class NetSpec(Protocol):
    """The settings of a network, a dataclass. Planning replaces from_teacher and from_recipe by one of these."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def build(self) -> Callable[..., nn.Module]:
        """build(shape, *, num_classes, arrival, guidance) returns the network for samples of that shape."""
        ...


@runtime_checkable
class Conditioned(Protocol):
    """Settings of a network that state whether its `build` takes extra_conditions."""

    @property
    def takes_extra_conditions(self) -> bool: ...


@runtime_checkable
class Attends(Protocol):
    """Settings of a network that state whether it attends to conditions of kind "tokens"."""

    @property
    def attends_to_tokens(self) -> bool: ...


@runtime_checkable
class WithConstants(Protocol):
    """Settings of a network that state whether it has buffers that no weights file contains."""

    @property
    def holds_constants(self) -> bool: ...


@runtime_checkable
class Adapted(Protocol):
    """Settings of a network that may train LoRA adapters in a frozen base."""

    @property
    def lora(self) -> Any: ...


def takes_extra_conditions(net: Any) -> bool:
    """Whether the network's `build` takes extra_conditions; False unless its settings state it."""
    return isinstance(net, Conditioned) and net.takes_extra_conditions


def attends_to_tokens(net: Any) -> bool:
    """Whether extra_conditions may be tokens; False unless the network's settings state it."""
    return isinstance(net, Attends) and net.attends_to_tokens


def holds_constants(net: Any) -> bool:
    """Whether the network has buffers that no weights file contains; False unless its settings state it."""
    return isinstance(net, WithConstants) and net.holds_constants


@dataclass(frozen=True)
class Stacked:
    """Two networks with the settings `net` and separate weights.

    `net` may be from_teacher or from_recipe: both networks then start with those weights.
    """

    net: NetSpec

    def __post_init__(self):
        if isinstance(self.net, Stacked):
            raise ValueError("net: a stack has two networks and cannot contain stacks")
        if isinstance(self.net, Adapted) and self.net.lora is not None:
            raise ValueError("net.lora: a stack trains all of its weights and has no frozen base; leave it out")

    @property
    def holds_constants(self) -> bool:
        return holds_constants(self.net)

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> StackedNet:
        net = partial(self.net.build, shape, num_classes=num_classes, arrival=arrival, guidance=guidance)
        return StackedNet(net(), net())


def stack_of(network: Callable[..., Any]) -> Callable[..., Stacked]:
    """A function from a network's settings to the stack's, with which an exported folder builds it."""
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
        """The blocks of both networks, the units of sharding; empty if they have none."""
        return [block for part in self.parts for block in blocks_of(part)]

    @property
    def empty(self) -> Cond:
        """The conditions for an empty prompt, which both networks use; networks without text have no such attribute."""
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
    """The settings of a stack's networks, or `spec` itself if it is not a stack."""
    return spec.net if isinstance(spec, Stacked) else spec
