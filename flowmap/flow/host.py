"""What the host decides about a batch without waiting for its device: copies to the device, and chosen rows.

A device is waited for where a number of its memory becomes one of Python (`item`, `bool`, `nonzero`, a mask as an
index), and where a tensor that is not pinned is copied to it (`torch.tensor(..., device=)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on that device; the host does not wait for the copy."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that the host has chosen: their indices (n,) int64 on the CPU, and on the batch's device.

    real: False for a row that stands in for none, as all processes call sharded weights equally often.
    """

    host: Tensor
    places: Tensor
    real: bool = True


def chosen_rows(mask: Tensor, device: torch.device) -> Rows:
    """The rows of a mask, which may be none. The host waits for a mask that is not on the CPU."""
    host = mask.cpu().nonzero().squeeze(1)
    return Rows(host, on_device(host, device))
