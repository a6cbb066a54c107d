"""The loader of a run's batches: threads that read ahead (workers), into pinned memory on CUDA.

Which samples a step reads is a function of (seed, step, rank) (data/steps.py), and reading a sample draws nothing from
torch's generators. Hence any number of workers gives the same batches, in a resumed run too. Processes would copy each
batch once more, through shared memory (docs/guide/scaling.md has the rates).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmap.base.distributed import num_cores
from flowmap.data import Dataset, PairedDataset, StepBatches
from flowmap.prepare.read_ahead import in_order
from flowmap.recipe import Recipe

MAX_AUTOMATIC = 2  # workers of a process: they share Python's lock, and the second only helps where a disk is slow


@dataclass(frozen=True)
class Loader:
    """An iterable over batches as they are stored, read by `workers` threads (0: when they are asked for).

    `complete` (data/dataset.py) finishes a batch in the training step. Each worker has two batches ready. An error of a
    worker is raised where its batch is asked for.
    """

    samples: Dataset | PairedDataset
    batches: StepBatches
    workers: int
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        return in_order(self._read, self.batches, self.workers) if self.workers else map(self._read, self.batches)

    def _read(self, places: list[int]) -> Any:
        batch = self.samples.stored_batch(places)
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # a thread starts on the first device
            return pinned(batch)


def loader_of(recipe: Recipe, samples: Dataset | PairedDataset, batches: StepBatches, device: torch.device) -> Loader:
    """The loader of those batches for a run on that device."""
    return Loader(samples, batches, workers_of(recipe, samples, device), device)


def workers_of(recipe: Recipe, samples: Dataset | PairedDataset, device: torch.device) -> int:
    """The number of workers of one process: trainer.workers, or by default none unless samples are read from disk for a
    GPU.
    """
    trainer = recipe.trainer
    if trainer.workers is not None:
        return trainer.workers
    if device.type != "cuda" or not samples.reads_disk:
        return 0
    return max(1, min(MAX_AUTOMATIC, num_cores() // recipe.batches.devices - 1))


def pinned(batch: Any) -> Any:
    """The batch with its tensors in pinned memory; captions stay as they are."""
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {name: pinned(value) for name, value in batch.items()}
    return tuple(map(pinned, batch)) if isinstance(batch, tuple) else batch
