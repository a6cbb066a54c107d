"""The random draws of a training step: a function of (run seed, number of earlier samples in the run).

A resumed run is bit-equal and saves no generator; a step draws the same however its batch is split over micro-batches
and processes. Only the masks of dropout, which torch draws for whole batches, are a function of (run seed, step,
micro-batch, process).
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from flowmap.flow.draws import Generator, RowGenerator, uniforms
from flowmap.flow.prior import LearnedPrior, Start, start_of
from flowmap.flow.times import diagonal_rows
from flowmap.flow.types import Cond, PathSample, broadcast_time
from flowmap.recipe import Recipe


def generator_for(seed: int, step: int, first: int, count: int, device: torch.device) -> RowGenerator:
    """The generator of the step's samples that come after `first`, first + 1, ... others in the run."""
    where = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    rows = lambda device: torch.arange(first, first + count, device=device)
    return RowGenerator(f"train/{seed}", rows(where), step, rows("cpu"))


@contextmanager
def drawing_by(name: str, device: torch.device):
    """Seed torch's own generator, from which dropout draws, by the name, and restore it afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))
        yield


def draw_sample(
    recipe: Recipe,
    x0: Tensor,
    cond: Cond,
    generator: Generator,
    empty: Cond | None = None,
    x1: Tensor | None = None,
    prior: LearnedPrior | None = None,
) -> PathSample:
    """Draw noise, times, dropped conditions, guidance scale and interval for x0 (B, ...), in this order, by one
    generator.

    x1: the noise that the batch is paired with; then the prior draws nothing, and its code, if any, is cond["z"].
    prior: the recipe's learned prior, if it has one. A dropped condition is class -1, and for text the row of `empty`
    (one row each).
    """
    n, device = len(x0), x0.device
    conditioning = {"z": cond["z"]} if "z" in cond else {}
    cond = {key: value for key, value in cond.items() if key != "z"} if recipe.data.conditional else {}
    start = start_of(prior or recipe.prior, x0, cond, generator) if x1 is None else Start(x1, conditioning)
    t, s = recipe.times(n, device=device, generator=generator)
    if cond and recipe.data.drop_condition > 0:
        dropped = uniforms(n, device, generator) < recipe.data.drop_condition
        nothing = {"class": torch.full((1,), -1, device=device)} | {
            key: row.to(device) for key, row in (empty or {}).items()
        }
        for key in cond.keys() & nothing.keys():
            cond[key] = torch.where(broadcast_time(dropped, cond[key]), nothing[key], cond[key])
    share = recipe.data.drop_attribute
    for key in sorted(key for key, value in cond.items() if share and key != "class" and _is_number(value)):
        cond[key] = torch.where(uniforms(n, device, generator) < share, -1, cond[key])
    guidance = recipe.teacher.guidance if recipe.teacher else None
    if guidance is not None:
        low, high = guidance.scale
        cond["guidance"] = low + (high - low) * uniforms(n, device, generator)
        if guidance.interval_input:
            cond["guidance_interval"] = _intervals(n, device, generator, *guidance.interval)
    place = generator.host_rows if isinstance(generator, RowGenerator) else None
    return replace(
        recipe.path.sample(x0, start.x1, t, s, {**cond, **start.conditioning} or None),
        variance=start.variance,
        place=place,
        still=None if place is None else diagonal_rows(recipe.times, place),
    )


def _is_number(value: Tensor) -> bool:
    """Whether a condition is one number per row; rows of tokens are not."""
    return value.dtype == torch.int64 and value.ndim == 1


def _intervals(n: int, device: torch.device, generator: Generator, low: float, high: float) -> Tensor:
    """Intervals (n, 2) within [low, high] around its middle: one end uniform in each half."""
    half = (high - low) / 2
    ends = [low + half * (i + uniforms(n, device, generator)) for i in range(2)]
    return torch.stack(ends, 1)
