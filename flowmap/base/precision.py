"""The precision in which networks are called, and autocast on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def in_precision(call: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """The function, called under the autocast that training has at trainer.precision: bfloat16 for "bf16".

    On a CPU it is called as it is, in float32.
    """
    if precision != "bf16" or device.type == "cpu":
        return call
    return torch.autocast(device.type, torch.bfloat16)(call)


def autocast_type(device: torch.device) -> str:
    """The device's type for autocast. The meta device, on which costs are counted, has none and takes the CPU's."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The precision in which autocast computes a matrix product of x; without autocast, and in float64, that of x."""
    kind = autocast_type(x.device)
    on = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else x.dtype


def without_autocast(device: torch.device) -> torch.autocast:
    """A context that disables autocast on that device."""
    return torch.autocast(autocast_type(device), enabled=False)


@contextmanager
def whole_float32() -> Iterator[None]:
    """Within it, float32 matrix products and convolutions on a GPU are of float32, not of TensorFloat-32."""
    with tensor_float_32(False):
        yield


@contextmanager
def tensor_float_32(on: bool) -> Iterator[None]:
    """Within it, float32 matrix products and convolutions on a GPU are of TensorFloat-32, or are not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished what it was given, so that a clock measures that."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
