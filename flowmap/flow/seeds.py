"""Randomness as a function of a name: nothing is saved, and any process draws the same."""

from __future__ import annotations

import hashlib

import torch


def seeded(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on that device, seeded by a hash of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
