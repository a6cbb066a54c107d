"""Batches of another size, from batches as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


def rebatched(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The rows of the batches' tensors, in their order, in batches of `size` rows; the last one may have fewer.

    At most `size` rows and one batch are held. A batch is taken when its rows are requested.
    """
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        while sum(map(_rows, held)) >= size:
            whole = _joined(held)
            held = [{key: value[size:] for key, value in whole.items()}]
            yield {key: value[:size] for key, value in whole.items()}
    if sum(map(_rows, held)):
        yield _joined(held)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _joined(batches: list[Batch]) -> Batch:
    return batches[0] if len(batches) == 1 else {k: torch.cat([one[k] for one in batches]) for k in batches[0]}
