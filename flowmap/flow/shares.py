"""Shares of the samples, by a rule: which of them are in a share is a function of how many of the run's samples came before, not of the batch.

Of the first n samples a share has n times itself, to within one; of every n for which that number is whole, from a multiple of n on, exactly it.
"""

from __future__ import annotations

import sys
from fractions import Fraction

import torch
from torch import Tensor

FINEST = 10**6  # the largest denominator: of a share that is not a fraction of so many the nearest one is taken


def fraction(share: float | Fraction) -> Fraction:
    """A share as a fraction, which floats only approach: 0.15 is 3 / 20."""
    return Fraction(share).limit_denominator(FINEST)


def taken(count: Tensor, share: float | Fraction, *, turned: int | None = None) -> Tensor:
    """How many of the first `count` samples are in that share, (N,) int64: evenly spread, floor(count * share).

    turned: a number that names the share. Then, in every stretch of as many samples as the fraction's denominator, it begins elsewhere, by a
    hash of the stretch: a share of the samples that are in another one has its part of those as well, whatever the two periods are.
    """
    part = fraction(share)
    stretch, within = count // part.denominator, count % part.denominator
    begins = torch.zeros_like(count) if turned is None else hashed(stretch, turned) % part.denominator
    inside = ((begins + within) * part.numerator) // part.denominator - (begins * part.numerator) // part.denominator
    return stretch * part.numerator + inside


def evenly(count: Tensor, share: float | Fraction, *, turned: int | None = None) -> Tensor:
    """Whether the sample that comes after `count` others is in that share, a mask."""
    part = fraction(share)
    within = count % part.denominator
    begins = 0 if turned is None else hashed(count // part.denominator, turned)
    return (
        (begins + within) % part.denominator * part.numerator
    ) % part.denominator >= part.denominator - part.numerator


def hashed(x: Tensor, salt: int) -> Tensor:
    """A hash of each number of x, int64 and not negative: the finalizer of MurmurHash3, in arithmetic that wraps around."""
    x = x + salt * 0x9E3779B97F4A7C1
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * factor
    return (x ^ (x >> 33 & 0x7FFFFFFF)) & 0x7FFFFFFFFFFFFFFF


def called_on(rows: Tensor, student) -> Tensor | None:
    """The places (n,) of the rows of a mask that the network is to be called on; None where it is not called.

    Where weights are sharded over processes every one of them must call the network as often as the others: one that has no such rows, while
    another has, gets its first row, which is not in the mask and must be given no weight.
    """
    if not anywhere(rows, student):
        return None
    places = rows.nonzero().squeeze(1)
    return places if len(places) else torch.zeros(1, dtype=torch.int64, device=rows.device)


def anywhere(rows: Tensor, student) -> bool:
    """Whether the mask has a row; on any process, where weights are sharded."""
    found = rows.any().float()
    if sharded(student):
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def sharded(student) -> bool:
    """Whether its weights lie on several processes (FSDP2), so that a call of it is one of all processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(student, fsdp.FSDPModule)
