"""Discriminators that look through a frozen network: heads on what the teacher's own blocks say, or on the features of a packaged network.

Sources: LADD, arXiv:2403.12015 (the teacher's own features); Projected GANs, arXiv:2111.01007 (a packaged network's). The frozen network is
not a submodule: it is in no parameters() and no state_dict().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap.base.ranges import BelowOne, Range, Width, check_ranges
from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets.discriminator import Head, channels_of, check_shape, in_float32

MOST_BLOCKS = 4
ROWS_OF_BLOCKS = ("blocks", "unet.enc", "model.enc", "model.transformer_blocks", "model.down_blocks")

Trunk = Callable[[Tensor], Tensor | list[Tensor]]


@dataclass(frozen=True)
class OnTeacher:
    """Heads on the teacher's blocks, those of `blocks` (none named: at most four, evenly spread), at the point (1 - time) x + time noise.

    The teacher's network is frozen; attention in it is done in elementary operations, as the penalties are differentiated twice.
    """

    blocks: tuple[Annotated[int, Range(0, 1000)], ...] = ()
    time: BelowOne = 0.1
    width: Width = 64
    trunk: ClassVar[str] = "teacher"

    def __post_init__(self):
        check_ranges(self)

    def build(
        self, shape: tuple[int, ...], *, network: nn.Module, example: Cond, num_classes: int | None = None
    ) -> nn.Module:
        """network: the teacher's F(x, t, s, cond); example: one row of what it is conditioned on."""
        return OnTeacherNet(self, shape, network, example, num_classes)


class OnTeacherNet(nn.Module):
    def __init__(
        self, spec: OnTeacher, shape: tuple[int, ...], network: nn.Module, example: Cond, num_classes: int | None
    ):
        super().__init__()
        row = row_of_blocks(network)
        if not row:
            raise ValueError("kind: 'teacher' wants a teacher's network with a row of blocks, and this one has none")
        if any(not 0 <= i < len(row) for i in spec.blocks):
            raise ValueError(f"blocks: {spec.blocks} must lie in 0..{len(row) - 1}")
        spread = sorted({round((i + 1) * len(row) / MOST_BLOCKS) - 1 for i in range(MOST_BLOCKS)} - {-1})
        self.time, self._frozen, self._blocks = spec.time, (network,), tuple(row[i] for i in spec.blocks or spread)
        device = next(network.parameters()).device
        with torch.no_grad():
            features = self.features(
                torch.zeros(1, *shape, device=device), {key: value.to(device) for key, value in example.items()}, None
            )
        self.heads = nn.ModuleList(Head(channels_of(one), spec.width, num_classes) for one in features)

    def forward(self, x: Tensor, cond: Cond | None = None, noise: Tensor | None = None) -> Tensor:
        with in_float32(x.device):
            return sum(
                head(one, cond) for head, one in zip(self.heads, self.features(x, cond, noise), strict=True)
            ) / len(self.heads)

    def features(self, x: Tensor, cond: Cond | None, noise: Tensor | None) -> list[Tensor]:
        """What each chosen block gives; nothing else of the teacher's forward pass is looked at."""
        network, t = self._frozen[0], torch.full((len(x),), self.time, device=x.device)
        point = (1 - broadcast_time(t, x)) * x if noise is None else torch.lerp(x, noise.to(x.dtype), self.time)
        with _hearing(self._blocks) as heard, sdpa_kernel(SDPBackend.MATH):
            network.forward(point, t, t, cond)  # not as compiled: hooks and second derivatives
        return [heard[block] for block in self._blocks]


def row_of_blocks(network: nn.Module) -> list[nn.Module]:
    """The network's blocks in order, a UNet's encoder's; none where it has no such row."""
    for name in ROWS_OF_BLOCKS:
        found: Any = network
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, (nn.ModuleList, nn.ModuleDict)) and len(found):
            return list(found.values() if isinstance(found, nn.ModuleDict) else found)
    return []


@contextmanager
def _hearing(blocks: tuple[nn.Module, ...]) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, every pass through those blocks leaves its result here; of several tensors the last (text comes before pictures)."""
    heard: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, arguments, out) -> None:
        heard[block] = out if isinstance(out, Tensor) else [one for one in out if isinstance(one, Tensor)][-1]

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class OnFeatures:
    """Heads on the features of a packaged network: "efficientnet_lite0", or "package.mod:attr", a call x -> tensor or list of tensors.

    It sees pictures (B, 3, size, size) in [-1, 1]; size 0: as large as they are. It must not be a network that a metric looks with.
    """

    net: str = "efficientnet_lite0"
    size: Annotated[int, Range(0, 16_384)] = 224
    width: Width = 64
    trunk: ClassVar[str] = "features"

    def __post_init__(self):
        check_ranges(self)
        if self.net != "efficientnet_lite0" and not all(self.net.partition(":")):
            raise ValueError(f"net: {self.net!r} is not efficientnet_lite0 or package.mod:attr")

    def build(self, shape: tuple[int, ...], *, call: Trunk, num_classes: int | None = None) -> nn.Module:
        """call: that network, frozen."""
        check_shape(shape, "features")
        if shape[0] not in (1, 3):
            raise ValueError(
                f"kind: 'features' wants pictures of 1 or 3 channels, and the data's samples are {tuple(shape)}"
            )
        return OnFeaturesNet(self, shape, call, num_classes)


class OnFeaturesNet(nn.Module):
    def __init__(self, spec: OnFeatures, shape: tuple[int, ...], call: Trunk, num_classes: int | None):
        super().__init__()
        self.size, self._frozen = spec.size, (call,)
        on = [p.device for p in call.parameters()] if isinstance(call, nn.Module) else []
        with torch.no_grad():
            features = self.features(torch.zeros(1, *shape, device=on[0] if on else None))
        self.heads = nn.ModuleList(Head(channels_of(one), spec.width, num_classes) for one in features)

    def forward(self, x: Tensor, cond: Cond | None = None, noise: Tensor | None = None) -> Tensor:
        with in_float32(x.device):
            return sum(head(one, cond) for head, one in zip(self.heads, self.features(x), strict=True)) / len(
                self.heads
            )

    def features(self, x: Tensor) -> list[Tensor]:
        if self.size:
            x = F.interpolate(x.float(), (self.size, self.size), mode="bilinear", antialias=True)
        out = self._frozen[0](x.expand(-1, 3, -1, -1))
        return [out] if isinstance(out, Tensor) else list(out)

    def _apply(self, function, recurse: bool = True) -> OnFeaturesNet:
        """The frozen network, no submodule, goes to the device that the heads go to."""
        if isinstance(self._frozen[0], nn.Module):
            self._frozen[0]._apply(function)
        return super()._apply(function, recurse)
