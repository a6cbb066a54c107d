"""The precision in which networks are called outside of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def in_precision(call: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """The function, called under the autocast that training has at trainer.precision: bfloat16 for "bf16".

    On a CPU it is called as it is, in float32.
    """
    if precision != "bf16" or device.type == "cpu":
        return call
    return torch.autocast(device.type, torch.bfloat16)(call)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished what it was given, so that a clock measures that."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
