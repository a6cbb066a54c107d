"""What changes the speed of a GPU and no result beyond rounding: TensorFloat-32, and the memory format of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flowmap.base.distributed import on_gpus
from flowmap.base.precision import tensor_float_32
from flowmap.recipe import Recipe


@contextmanager
def fast_matmul(recipe: Recipe) -> Iterator[None]:
    """Within it, float32 matrix products and convolutions on a GPU are of TensorFloat-32, if the recipe allows."""
    trainer = recipe.trainer
    if not (trainer.tf32 and on_gpus(trainer.accelerator)):
        yield
        return
    with tensor_float_32(True):
        yield


def channels_last(net: nn.Module, asked: bool | None, device: torch.device) -> None:
    """Store the kernels of convolutions with channels last, in which form a GPU's tensor cores read them.

    asked: trainer.channels_last. Outputs of a convolution have the format of its kernel, so inputs need no change.
    """
    if asked is None:
        kernels = sum(p.numel() for p in net.parameters() if p.ndim == 4)
        asked = device.type == "cuda" and 2 * kernels > sum(p.numel() for p in net.parameters())
    if asked:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
