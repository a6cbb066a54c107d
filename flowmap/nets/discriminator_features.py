"""Discriminators with heads on features of a frozen network: the teacher's blocks, or a packaged network.

Sources: LADD, arXiv:2403.12015 (the teacher's features); Projected GANs, arXiv:2111.01007 (a packaged network's). The
frozen network is not a submodule: it is not in parameters() or state_dict().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap.base.precision import without_autocast
from flowmap.base.ranges import BelowOne, Range, Width, check_ranges
from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets.discriminator import Head, channels_of, check_shape

MOST_BLOCKS = 4
ROWS_OF_BLOCKS = (
    "blocks", "unet.enc", "model.enc", "model.transformer_blocks", "model.layers", "model.single_transformer_blocks",
    "model.down_blocks",
)  # fmt: skip

Trunk = Callable[[Tensor], Tensor | list[Tensor]]


@dataclass(frozen=True)
class OnTeacher:
    """Heads on the teacher's blocks at the point (1 - time) x + time noise.

    blocks: indices of the blocks; by default up to four, evenly spread. The teacher's network is frozen; its attention
    runs as elementary operations, since the penalties are differentiated twice.
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
        """network: the teacher's F(x, t, s, cond). example: one row of its conditions."""
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
        with without_autocast(x.device):
            scores = [head(one, cond) for head, one in zip(self.heads, self.features(x, cond, noise), strict=True)]
            return sum(scores) / len(scores)

    def features(self, x: Tensor, cond: Cond | None, noise: Tensor | None) -> list[Tensor]:
        """The outputs of the chosen blocks in one forward pass of the teacher."""
        network, t = self._frozen[0], torch.full((len(x),), self.time, device=x.device)
        point = (1 - broadcast_time(t, x)) * x if noise is None else torch.lerp(x, noise.to(x.dtype), self.time)
        with _hearing(self._blocks) as heard, sdpa_kernel(SDPBackend.MATH):
            # not the compiled forward of this module: it has no hooks and no second derivatives
            type(network).forward(network, point, t, t, cond)
        return [heard[block] for block in self._blocks]


def row_of_blocks(network: nn.Module) -> list[nn.Module]:
    """The network's blocks in order, for a UNet those of the encoder; empty if it has no known list of blocks."""
    modules = dict(network.named_modules())
    for name in ROWS_OF_BLOCKS:
        found = modules.get(name)
        if isinstance(found, (nn.ModuleList, nn.ModuleDict)) and len(found):
            return list(found.values() if isinstance(found, nn.ModuleDict) else found)
    return []


@contextmanager
def _hearing(blocks: tuple[nn.Module, ...]) -> Iterator[dict[nn.Module, Tensor]]:
    """A context that records the outputs of blocks; of several tensors the last, since text precedes image features."""
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
    """Heads on the features of a packaged network.

    net: "efficientnet_lite0", or "package.mod:attr", a function from x to a tensor or a list of tensors. It gets images
    (B, 3, size, size) in [-1, 1], or in their own size if `size` is 0. Do not use the network of a metric.
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
        """call: the frozen network."""
        check_shape(shape, "features")
        if shape[0] not in (1, 3):
            needs = "wants pictures of 1 or 3 channels"
            raise ValueError(f"kind: 'features' {needs}, and the data's samples are {tuple(shape)}")
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
        with without_autocast(x.device):
            scores = [head(one, cond) for head, one in zip(self.heads, self.features(x), strict=True)]
            return sum(scores) / len(scores)

    def features(self, x: Tensor) -> list[Tensor]:
        if self.size:
            x = F.interpolate(x.float(), (self.size, self.size), mode="bilinear", antialias=True)
        out = self._frozen[0](x.expand(-1, 3, -1, -1))
        return [out] if isinstance(out, Tensor) else list(out)

    def _apply(self, function, recurse: bool = True) -> OnFeaturesNet:
        """Move the frozen network, which is not a submodule, with the heads."""
        if isinstance(self._frozen[0], nn.Module):
            self._frozen[0]._apply(function)
        return super()._apply(function, recurse)
