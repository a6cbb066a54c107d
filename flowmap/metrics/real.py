"""Real samples that generated ones are compared with: read a chunk at a time, passed through a network once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from flowmap.base.distributed import rank, world_size

CHUNK = 256  # samples that pass through the features at once
CHUNK_BYTES = 2**28  # fewer of large pictures: a chunk in float32 is at most that large

Features = Callable[[Tensor], Tensor]
Device = torch.device | str


class Rows(Protocol):
    """Samples (N, ...) that are read by index: a tensor, or samples on disk."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


class FrozenNetwork(nn.Module):
    """A network that is not fitted to the reference, so that the features of a real sample never change."""

    def __init__(self, net: Features):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def metric_device(device: torch.device) -> torch.device:
    """The device of metrics, feature networks and their states, for samples on `device`: the same one.

    It is the CPU where the device has no float64 (mps).
    """
    return torch.device("cpu") if device.type == "mps" else device


def chunk_of(shape: Sequence[int]) -> int:
    """The number of samples of that shape, a power of two, that pass through the features at once."""
    most = min(CHUNK, CHUNK_BYTES // (4 * math.prod(shape)))
    return 1 << max(most.bit_length() - 1, 0)


def some(count: int, wanted: int | None, *, seed: int = 0) -> Tensor:
    """`wanted` of `count` places (None or too many: all), in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]


def mine(places: Tensor) -> Tensor:
    """Those of the places that this process is responsible for, in their order; every place has one such process."""
    return places[places % world_size() == rank()]


def features_in(features: Features, x: Tensor | None, found: Tensor | None) -> Iterable[Tensor]:
    """What a metric counts: the features `found`, if they are known, otherwise those of x in chunks."""
    if found is not None:
        return (found,)
    assert x is not None, "neither samples nor features"
    return map(features, x.split(CHUNK))


class Real:
    """Real samples `rows` on a device: their values, and their features, chunk by chunk.

    The features by a FrozenNetwork are kept on the CPU, (N, D) float32, for as long as `rows` exist: each sample
    passes through the network once in the process that is responsible for it, however many metrics and baselines ask.
    """

    _known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # rows -> {network: features that are known}

    def __init__(self, rows: Rows, device: Device = "cpu"):
        self.rows, self.device, self.chunk = rows, torch.device(device), chunk_of(rows.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, places: Tensor | None = None) -> Iterator[Tensor]:
        """The samples at those places (default: all), in chunks."""
        places = torch.arange(len(self)) if places is None else places
        return (self.rows[part].to(self.device) for part in places.split(self.chunk))

    def features(self, network: Features, places: Tensor) -> Iterator[Tensor]:
        """The features (B, D) of the samples at those places, in chunks."""
        if isinstance(network, FrozenNetwork):
            return (self._remembered(network, part) for part in places.split(self.chunk))
        return map(network, self.values(places))

    def all_features(self, network: Features, places: Tensor) -> Tensor:
        """The features (N, D) of the samples at those places in every process; each process computes a share."""
        own = mine(places)
        found = torch.cat([network(self.rows[:1].to(self.device))[:0], *self.features(network, own)])
        if world_size() == 1:
            return found
        from torchmetrics.utilities.distributed import gather_all_tensors

        whole = found.new_empty(len(places), found.shape[1])
        for process, part in enumerate(gather_all_tensors(found)):
            whole[places % world_size() == process] = part
        return whole

    @torch.no_grad()
    def _remembered(self, network: FrozenNetwork, places: Tensor) -> Tensor:
        of_rows = self._known.setdefault(self.rows, WeakIdKeyDictionary())
        if network not in of_rows:
            of_rows[network] = _Known(len(self))
        known = of_rows[network]
        new = places[~known.there[places]]
        if len(new):
            known.put(new, network(self.rows[new].to(self.device)))
        return known.features[places].to(self.device)


class _Known:
    """The features that are known of `count` samples."""

    def __init__(self, count: int):
        self.there = torch.zeros(count, dtype=torch.bool)
        self.features = torch.empty(0)

    def put(self, places: Tensor, found: Tensor) -> None:
        if not len(self.features):
            self.features = torch.empty(len(self.there), found.shape[1], dtype=found.dtype)
        self.features[places], self.there[places] = found.cpu(), True


def spread(rows: Rows, device: Device) -> Tensor:
    """The standard deviation of all values of all samples, a float64 scalar; of samples on disk chunk by chunk."""
    if isinstance(rows, Tensor):
        return rows.double().std()
    total, squares, count = 0.0, 0.0, len(rows) * math.prod(rows.shape[1:])
    real = Real(rows, device)
    for part in real.values():
        total += float(part.double().sum())
    for part in real.values():
        squares += float((part.double() - total / count).square().sum())
    return torch.tensor(math.sqrt(squares / max(count - 1, 1)), dtype=torch.float64)
