"""Random generators seeded by a name, the same in every process, so that no generator state need be saved."""

from __future__ import annotations

import hashlib

import torch


def seeded(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on the device, seeded by a hash of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
