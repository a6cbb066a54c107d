"""How a run is distributed over processes: not at all, DDP, or FSDP2 (fully_shard); and the files of its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

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


def shard(net: nn.Module, mesh) -> None:
    """Apply FSDP2 to every block (the network's `blocks`) and to the whole network."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"] if mesh is not None and mesh.ndim > 1 else mesh
    for block in getattr(net.net, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in ("mean_velocity", "velocity", "log_error"):
        torch.distributed.fsdp.register_fsdp_forward_method(net, method)


@contextmanager
def fast_matmul(recipe: Recipe) -> Iterator[None]:
    """Within it, float32 matrix products and convolutions on a GPU are of TensorFloat-32, if the recipe allows."""
    trainer = recipe.trainer
    if not (trainer.tf32 and torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")):
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def channels_last(net: nn.Module, asked: bool | None, device: torch.device) -> None:
    """Store the kernels of convolutions with channels last, in which form a GPU's tensor cores read them.

    asked: trainer.channels_last. Outputs of a convolution have the format of its kernel, so inputs need no change.
    """
    if asked is None:
        kernels = sum(p.numel() for p in net.parameters() if p.ndim == 4)
        asked = device.type == "cuda" and 2 * kernels > sum(p.numel() for p in net.parameters())
    if asked:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints with a checksum, written atomically; only tensors and plain containers are unpickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
