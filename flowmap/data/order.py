"""The order of the samples of an epoch: a random permutation of all, or of blocks and within a window of them.

A function of (seed, epoch) alone, computed where it is asked for, so that any place of any epoch can be.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # consecutive samples
WINDOW = 128  # blocks whose samples are mixed


class Order(Protocol):
    """order(epoch, place) -> the samples of that epoch from `place` on, one or more of them."""

    def __call__(self, epoch: int, place: int) -> Tensor: ...


class GlobalOrder:
    """A random permutation of all samples. It holds one epoch's, 8 bytes a sample."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._found = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, epoch: int, place: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._found = epoch, permutation(self.num_samples, self.seed, epoch)
        return self._found[place:]


class BlockOrder:
    """Blocks of consecutive samples in a random order, of which each WINDOW in turn has its samples mixed.

    A disk reads a block as a whole, and only a window has to fit into memory: BLOCK * WINDOW samples. It holds the
    order of an epoch's blocks and that of one window's samples. Data of no more samples are permuted as a whole.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._window = -1, -1
        self._blocks = self._ends = self._found = torch.empty(0, dtype=torch.int64)

    def __call__(self, epoch: int, place: int) -> Tensor:
        if epoch != self._epoch:
            self._open(epoch)
        window = int(torch.searchsorted(self._ends, place, right=True))
        if window != self._window:
            self._window, self._found = window, self._mixed(window)
        return self._found[len(self._found) + place - int(self._ends[window]) :]

    def _open(self, epoch: int) -> None:
        """The order of the epoch's blocks, and the place at which each window ends."""
        self._epoch, self._window = epoch, -1
        self._blocks = permutation(-(-self.num_samples // BLOCK), self.seed, epoch)
        ends = (self._sizes(self._blocks)).cumsum(0)
        self._ends = torch.cat([ends[WINDOW - 1 : -1 : WINDOW], ends[-1:]])

    def _mixed(self, window: int) -> Tensor:
        blocks = self._blocks[window * WINDOW : (window + 1) * WINDOW]
        samples = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        samples = samples[samples < self.num_samples]
        return samples[permutation(len(samples), self.seed, self._epoch, 1 + window)]

    def _sizes(self, blocks: Tensor) -> Tensor:
        """Of each block: the last one in the data may be short."""
        return (self.num_samples - blocks * BLOCK).clamp(max=BLOCK)


ORDERS: dict[str, type[GlobalOrder | BlockOrder]] = {"global": GlobalOrder, "blocks": BlockOrder}


def permutation(count: int, *seeds: int) -> Tensor:
    """(count,) int64, a random permutation that those numbers determine."""
    mixed = int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0] >> 1)  # manual_seed wants an int64
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
