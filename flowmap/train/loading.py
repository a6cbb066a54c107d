"""The loader of a run's batches: processes that read ahead (workers), and pinned memory on CUDA.

Which samples a step reads is a function of (seed, step, rank) (data/steps.py), and reading a sample draws nothing from
torch's generators. Hence any number of workers gives the same batches, in a resumed run too.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowmap.base.distributed import num_cores
from flowmap.base.schema import RecipeError
from flowmap.data import Dataset, PairedDataset, StepBatches, as_it_is
from flowmap.recipe import Recipe

AHEAD = 2  # batches that each worker has ready
MAX_AUTOMATIC = 4  # workers of a process: one reads about 50,000 latents a second, texts and pairs are slower
SHARED_MEMORY = "/dev/shm"  # where workers put their batches


def loader_of(
    recipe: Recipe, samples: Dataset | PairedDataset, batches: StepBatches, device: torch.device
) -> DataLoader:
    """The loader of those batches for a run on that device. RecipeError where shared memory is too small for it."""
    workers = workers_of(recipe, samples, device)
    options: dict[str, Any] = {"prefetch_factor": AHEAD, "worker_init_fn": _prepare_worker} if workers else {}
    # A data set here gives whole batches, by __getitems__. persistent_workers has no effect: the batches never end.
    return DataLoader(
        cast(Any, _Stored(samples)),
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        **options,
    )


class _Stored:
    """Batches as a worker reads them; `complete` (data/dataset.py) finishes them in the training process."""

    def __init__(self, samples: Dataset | PairedDataset):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._samples.stored_batch(indices)


def workers_of(recipe: Recipe, samples: Dataset | PairedDataset, device: torch.device) -> int:
    """The number of workers of one process: trainer.workers, or by default none unless samples are read from disk for a
    GPU.
    """
    trainer, devices = recipe.trainer, recipe.batches.devices
    automatic = (
        max(1, min(MAX_AUTOMATIC, num_cores() // devices - 1)) if device.type == "cuda" and samples.reads_disk else 0
    )
    workers = automatic if trainer.workers is None else trainer.workers
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return workers
    batch = recipe.data.batch_size * _bytes(samples.stored_batch([0]))
    needed, free = devices * workers * AHEAD * batch, shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return workers
    if trainer.workers is None:
        return 0
    raise RecipeError(
        f"{recipe.name}: trainer.workers: {workers} workers with {AHEAD} batches of {batch / 2**20:.1f} MiB each, on "
        f"{devices} devices, want {needed / 2**30:.2f} GiB of shared memory, and {SHARED_MEMORY} has "
        f"{free / 2**30:.2f} GiB free; take fewer (0 is allowed), or give a container more (--shm-size)"
    )


def _prepare_worker(number: int) -> None:
    """Survive the signals by which a scheduler preempts a run: it sends them to every process, and without its workers
    the main process could not finish its step. SIGTERM of the main process ends a worker, as torch expects.
    """
    for one in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a signal does not say who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _bytes(batch: Any) -> int:
    """The bytes of the tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    parts: Iterable[Any] = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else ()
    return sum(map(_bytes, parts))
