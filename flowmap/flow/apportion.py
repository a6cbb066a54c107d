"""Assigns classes to samples in proportion to given counts, over all samples and nearly so over every first part."""

from __future__ import annotations

import torch
from torch import Tensor


def apportioned(counts: Tensor, num: int) -> Tensor:
    """The class of each sample, (num,) int64: class k occurs num counts[k] / sum(counts) times, rounded up or down.

    Rounding follows the largest remainder method. counts (K,) are 0 or more. The j-th of the c samples of a class is
    placed at (j + 1/2) / c of the whole, so each class is spread evenly; equal counts give the classes in turn. Raises
    a ValueError if all counts are 0.
    """
    total = int(counts.sum())
    if total < 1 or int(counts.min()) < 0:
        raise ValueError(f"counts: {counts.tolist()} must be 0 or more each, and not all 0")
    quota, rest = (counts * num).div(total, rounding_mode="floor"), (counts * num) % total
    quota[torch.argsort(rest, descending=True, stable=True)[: num - int(quota.sum())]] += 1
    classes = torch.arange(len(counts)).repeat_interleave(quota)
    place = torch.cat([(torch.arange(c, dtype=torch.float64) + 0.5) / c for c in quota.tolist() if c])
    return classes[torch.argsort(place, stable=True)]
