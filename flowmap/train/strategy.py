"""How a run is distributed over processes: not at all, DDP, or FSDP2 (fully_shard); and the files of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from flowmap.recipe import Recipe
from flowmap.train.checkpoint_file import read_checkpoint, write_checkpoint

BOTH = "cpu:gloo,cuda:nccl"


def strategy_for(recipe: Recipe) -> str | Strategy:
    """Lightning's strategy. On GPUs its process group also reduces tensors of the CPU; Lightning's default is NCCL."""
    trainer = recipe.trainer
    world = trainer.devices * trainer.num_nodes
    backend = BOTH if on_gpus(recipe) else None
    if trainer.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    if trainer.strategy == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, process_group_backend=backend)
    if backend is not None and world > 1:
        return DDPStrategy(process_group_backend=backend)
    return "auto"


def on_gpus(recipe: Recipe) -> bool:
    """Whether the trainer's devices are GPUs on this machine."""
    return recipe.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints with a checksum, written atomically; only tensors and plain containers are unpickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
