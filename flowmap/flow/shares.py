"""Deterministic selection of a share of the samples, as a function of a sample's index in the run, not of the batch.

Of the first n samples, share * n are selected, to within one. If share * n is a whole number, exactly that many are
selected of every n samples that start at a multiple of n.
"""

from __future__ import annotations

import sys
from fractions import Fraction

import torch
from torch import Tensor

from flowmap.base.distributed import any_process
from flowmap.flow.host import Rows, chosen_rows, on_device

FINEST = 10**6  # the largest denominator: other shares are rounded to the nearest such fraction


def fraction(share: float | Fraction) -> Fraction:
    """A share as an exact fraction: 0.15 becomes 3 / 20."""
    return Fraction(share).limit_denominator(FINEST)


def taken(count: Tensor, share: float | Fraction, *, turned: int | None = None) -> Tensor:
    """The number of the first `count` samples that are selected, (N,) int64: evenly spread, floor(count * share).

    turned: an id of the share. With it, every period (as many samples as the fraction's denominator) is rotated by a
    hash of the period and the id, so that two shares with related periods are selected independently.
    """
    part = fraction(share)
    stretch, within = count // part.denominator, count % part.denominator
    begins = torch.zeros_like(count) if turned is None else hashed(stretch, turned) % part.denominator
    inside = ((begins + within) * part.numerator) // part.denominator - (begins * part.numerator) // part.denominator
    return stretch * part.numerator + inside


def evenly(count: Tensor, share: float | Fraction, *, turned: int | None = None) -> Tensor:
    """Whether the samples with index `count` are selected, a mask."""
    part = fraction(share)
    within = count % part.denominator
    begins = 0 if turned is None else hashed(count // part.denominator, turned)
    place = (begins + within) % part.denominator
    return (place * part.numerator) % part.denominator >= part.denominator - part.numerator


def hashed(x: Tensor, salt: int) -> Tensor:
    """A non-negative int64 hash of each entry of x: the finalizer of MurmurHash3, in wrap-around arithmetic."""
    x = x + salt * 0x9E3779B97F4A7C1
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * factor
    return (x ^ (x >> 33 & 0x7FFFFFFF)) & 0x7FFFFFFFFFFFFFFF


def called_on(mask: Tensor, student, device: torch.device) -> Rows | None:
    """The masked rows for which to call the network; None if it is not to be called.

    If weights are sharded over processes, all of them must call the network equally often. A process without masked
    rows then gets row 0 if another process has some; the caller must give that row no weight.
    """
    mask = mask.cpu()
    if not anywhere(mask, student):
        return None
    if bool(mask.any()):
        return chosen_rows(mask, device)
    host = torch.zeros(1, dtype=torch.int64)
    return Rows(host, on_device(host, device), real=False)


def anywhere(mask: Tensor, student) -> bool:
    """Whether the mask, on the CPU, has a row, on any process if weights are sharded."""
    found = bool(mask.any())
    return any_process(found) if sharded(student) else found


def sharded(student) -> bool:
    """Whether the student's weights are sharded over processes (FSDP2), so that all of them must call it together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(student, fsdp.FSDPModule)
