"""Every draw of a training step is a function of (run seed, step, micro-batch, rank): a resumed run is bit-equal and saves no generator."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

from flowmap.flow.seeds import seeded
from flowmap.flow.types import Cond, PathSample, along
from flowmap.recipe import Recipe


def generator_for(seed: int, step: int, micro: int, rank: int, device: torch.device) -> torch.Generator:
    """A generator seeded by a hash of those four numbers."""
    return seeded(f"{seed}/{step}/{micro}/{rank}", device)


@contextmanager
def drawing_from(generator: torch.Generator):
    """Inside, torch's own draws (dropout takes no generator) are a function of the generator's state; afterwards they go on as before."""
    device = generator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=device)))
        yield


def draw_sample(
    recipe: Recipe, x0: Tensor, cond: Cond, generator: torch.Generator, empty: Cond | None = None, x1: Tensor | None = None
) -> PathSample:
    """Noise, times, dropped conditions and guidance scale for a batch x0 (B, ...), in this order, from one generator.

    x1: the noise that the batch is paired with; the prior is not asked then. A dropped condition is class -1, and the row of `empty` (one
    row each) for what came of text.
    """
    n, device = len(x0), x0.device
    cond = dict(cond) if recipe.data.conditional else {}
    x1 = recipe.prior.sample(x0, cond, generator) if x1 is None else x1
    t, s = recipe.times(n, device=device, generator=generator)
    if cond and recipe.data.drop_condition > 0:
        dropped = torch.rand(n, generator=generator, device=device) < recipe.data.drop_condition
        nothing = {"class": torch.tensor([-1], device=device)} | {key: row.to(device) for key, row in (empty or {}).items()}
        for key in cond.keys() & nothing.keys():
            cond[key] = torch.where(along(dropped, cond[key]), nothing[key], cond[key])
    share = getattr(recipe.data, "drop_attribute", 0.0)
    for key in sorted(key for key, value in cond.items() if share and key != "class" and value.dtype == torch.int64):
        cond[key] = torch.where(torch.rand(n, generator=generator, device=device) < share, -1, cond[key])
    guidance = recipe.teacher.guidance if recipe.teacher else None
    if guidance is not None:
        low, high = guidance.scale
        cond["guidance"] = low + (high - low) * torch.rand(n, generator=generator, device=device)
    return recipe.path.sample(x0, x1, t, s, cond or None)
