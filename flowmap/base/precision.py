"""Autocast on any device. The meta device, on which costs are counted, has none and takes the CPU's."""

from __future__ import annotations

import torch


def autocast_type(device: torch.device) -> str:
    """The device's type for torch's autocast functions."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def without_autocast(device: torch.device) -> torch.autocast:
    """A context that disables autocast on that device."""
    return torch.autocast(autocast_type(device), enabled=False)
