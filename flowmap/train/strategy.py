"""How a run is spread over processes: plain, DDP, or FSDP2 (fully_shard), and the files that hold its state."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from flowmap.files import write_beside
from flowmap.recipe import Recipe


def strategy_for(recipe: Recipe) -> str | Strategy:
    trainer = recipe.trainer
    if trainer.strategy == "fsdp":
        world = trainer.devices * trainer.num_nodes
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if trainer.strategy == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def shard(net: nn.Module, mesh) -> None:
    """FSDP2 on every block and on the whole; the blocks are the network's `blocks`."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"] if mesh is not None and mesh.ndim > 1 else mesh
    for block in getattr(net.net, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in ("mean_velocity", "velocity", "log_error"):
        torch.distributed.fsdp.register_fsdp_forward_method(net, method)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside and renamed, read without unpickling anything but tensors and plain containers."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_beside(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in that file; ValueError names it if it is torn, hostile or not a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle's protocol; the error below says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # the restricted unpickler raises whatever a foreign file makes it stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path}: is not a whole checkpoint (torn, or holds more than tensors): {reason}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step", "optimizer_states"} <= set(state):
        raise ValueError(f"{path}: is not a checkpoint of a flowmap run")
    if not isinstance(state["state_dict"], dict) or not all(isinstance(v, torch.Tensor) for v in state["state_dict"].values()):
        raise ValueError(f"{path}: state_dict: holds more than tensors")
    if not isinstance(state["global_step"], int):
        raise ValueError(f"{path}: global_step: {state['global_step']!r} is not a whole number")
    return state
