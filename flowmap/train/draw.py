"""Every draw of a training step is a function of (run seed, step, micro-batch, rank): a resumed run is bit-equal and saves no generator."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from flowmap.flow.types import PathSample
from flowmap.recipe import Recipe


def generator_for(seed: int, step: int, micro: int, rank: int, device: torch.device) -> torch.Generator:
    """A generator seeded by a hash of those four numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def draw_sample(recipe: Recipe, x0: Tensor, cond: dict[str, Tensor], generator: torch.Generator) -> PathSample:
    """Noise, times, guidance scale and dropped conditions for a batch x0 (B, ...), in this order, from one generator."""
    n, device = len(x0), x0.device
    cond = dict(cond) if recipe.data.conditional else {}
    x1 = recipe.prior.sample(x0, cond, generator)
    t, s = recipe.times(n, device=device, generator=generator)
    if "class" in cond and recipe.data.drop_condition > 0:
        dropped = torch.rand(n, generator=generator, device=device) < recipe.data.drop_condition
        cond["class"] = torch.where(dropped, -1, cond["class"])
    guidance = recipe.teacher.guidance if recipe.teacher else None
    if guidance is not None:
        low, high = guidance.scale
        cond["guidance"] = low + (high - low) * torch.rand(n, generator=generator, device=device)
    return recipe.path.sample(x0, x1, t, s, cond or None)
