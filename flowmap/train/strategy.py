"""How a run is distributed over processes: not at all, DDP, or FSDP2 (fully_shard); and the files of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from flowmap.recipe import Recipe
from flowmap.train.checkpoint_file import read_checkpoint, write_checkpoint


def strategy_for(recipe: Recipe) -> str | Strategy:
    trainer = recipe.trainer
    if trainer.strategy == "fsdp":
        world = trainer.devices * trainer.num_nodes
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if trainer.strategy == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints with a checksum, written atomically; only tensors and plain containers are unpickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
