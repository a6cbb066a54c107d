"""How a run is distributed over processes: not at all, DDP, or FSDP2 (fully_shard); and the files of its state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from flowmap.base.distributed import BOTH, on_gpus
from flowmap.recipe import Recipe
from flowmap.train.checkpoint_file import read_checkpoint, write_checkpoint
from flowmap.train.sharded_checkpoint import REST, check_shards, complete, place_of, restore, snapshot, write_shard


def strategy_for(recipe: Recipe) -> str | Strategy:
    """Lightning's strategy. On GPUs its process group also reduces tensors of the CPU; Lightning's default is NCCL."""
    trainer = recipe.trainer
    world = trainer.devices * trainer.num_nodes
    backend = BOTH if on_gpus(trainer.accelerator) else None
    if trainer.strategy == "fsdp":
        return ShardedStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend=backend)
    if trainer.strategy == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, process_group_backend=backend)
    if backend is not None and world > 1:
        return DDPStrategy(process_group_backend=backend)
    return "auto"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with checkpoints of which every process writes its own part (sharded_checkpoint.py).

    On accelerators they are written in the background from copies on the CPU, except the first one of a process, which
    is there when `save_checkpoint` returns.
    """

    _writing: Thread | None = None
    _error: BaseException | None = None
    _saved = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes the weights

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return {"state": {}, "param_groups": plain.state_dict()["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options=None) -> None:
        self.finish_writing()
        assert self.model is not None
        target = Path(self.broadcast(str(filepath)))
        folder = target.with_name(self.broadcast(f".{target.name}.{os.getpid()}.tmp"))
        replica, shard, shards = place_of(self.model)
        tensors = snapshot(self.model, self.optimizers, shard) if replica == 0 else {}
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}

        def write() -> None:
            if replica == 0:
                write_shard(folder, shard, tensors)
            if self.global_rank == 0:
                write_checkpoint(folder / REST, checkpoint)
                complete(folder, target, shapes, shards)

        if self.in_background():
            self._writing = Thread(target=self._keeping_errors, args=(write,), name="checkpoint")
            self._writing.start()
        else:
            write()
            self.barrier()
        self._saved = True

    def in_background(self) -> bool:
        """Whether the next checkpoint is written while training goes on."""
        return self._saved and self.root_device.type != "cpu"

    def finish_writing(self) -> None:
        """Wait for the checkpoint that is being written; raise the error if it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _keeping_errors(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if not path.is_dir():  # of a version that wrote one file
            return super().load_checkpoint(path, weights_only=weights_only)
        assert self.model is not None
        rest, (_, shard, shards) = read_checkpoint(path), place_of(self.model)
        check_shards(path, slice(shard, None, shards))
        restore(path, self.model, self.optimizers, [one["param_groups"] for one in rest["optimizer_states"]])
        return rest

    def teardown(self) -> None:
        self.finish_writing()
        super().teardown()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints with a checksum, written atomically; only tensors and plain containers are unpickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
