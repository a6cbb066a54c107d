"""Successive halving: all candidates are compared on few samples, and only the better ones on more.

Source: Jamieson, Talwalkar 2016, arXiv:1502.07943. All candidates of a round have the same noise and the same number of
samples, so that the bias of a distance at that number is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Measure = Callable[[T, int], float]  # candidate, number of samples -> its distance

ROUNDS = 3
GROWTH = 3  # the factor of the number of samples from one round to the next
KEPT = 4  # one of so many candidates goes on to the next round
FEWEST = 64  # samples of the first round, unless the last has fewer


@dataclass(frozen=True)
class Round:
    """How many candidates are compared, on how many samples each."""

    candidates: int
    samples: int


def rounds_of(candidates: int, samples: int) -> list[Round]:
    """The rounds for so many candidates, the start apart; the last has all the samples, and is the only one of none."""
    if not candidates:
        return [Round(0, samples)]
    sizes = [max(min(FEWEST, samples), math.ceil(samples / GROWTH**i)) for i in reversed(range(ROUNDS))]
    found: list[Round] = []
    for size in sorted(set(sizes)):
        found.append(Round(candidates, size))
        candidates = math.ceil(candidates / KEPT)
    return found


def halved(start: T, candidates: Sequence[T], samples: int, measure: Measure[T]) -> tuple[T, float, float]:
    """The best candidate, its distance, and that of the start, on all samples.

    The start is compared in every round, so that the best is never worse. A distance that is not finite is the worst.
    """
    left, found = [one for one in dict.fromkeys(candidates) if one != start], {}
    for place in rounds_of(len(left), samples):
        found = {one: _finite(measure(one, place.samples)) for one in (start, *left[: place.candidates])}
        left = sorted((one for one in found if one != start), key=lambda one: found[one])
    best = min(found, key=lambda one: found[one])
    return best, found[best], found[start]


def _finite(distance: float) -> float:
    return distance if math.isfinite(distance) else math.inf
