"""Samples on disk that are read when they are indexed, so that a metric holds a batch of them and never all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class StoredSamples:
    """`count` samples of `shape`, float32. Indexing by a number, a slice or an index tensor reads those samples.

    read maps places (B,) int64 to samples (B, *shape). It takes the place of a tensor (count, *shape) wherever a tensor
    is only indexed, iterated over, or asked for its length and shape.
    """

    def __init__(self, count: int, shape: tuple[int, ...], read: Callable[[Tensor], Tensor]):
        self.shape, self._read = torch.Size((count, *shape)), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"{index} is not one of {len(self)} samples")
            return self._read(torch.tensor([index % len(self)]))[0]
        return self._read(torch.arange(len(self))[index])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))
