"""The settings of objectives with a warmed-up and normalised derivative (arXiv:2410.11081, arXiv:2506.14603)."""

from __future__ import annotations

from dataclasses import dataclass

from flowmap.base.ranges import CountFromZero, FromZero, Share, check_ranges
from flowmap.flow.derivative import derivative_named
from flowmap.flow.distance import NORMS
from flowmap.flow.parts import BaseObjective


@dataclass(frozen=True)
class Tangent(BaseObjective):
    """The derivative's weight is r = min(r_max, step / warmup_steps); the residual g becomes g / (||g|| + c) per
    sample.

    norm: "l2", "rms" (l2 / sqrt of the dimension) or "none". derivative: how d/dt or d/ds is computed, "dual",
    "forward" or "difference" (flow/derivative.py).
    """

    warmup_steps: CountFromZero = 10_000
    r_max: Share = 0.99
    norm: str = "l2"
    c: FromZero = 0.1
    derivative: str = "dual"

    def __post_init__(self):
        check_ranges(self)
        object.__setattr__(self, "derivative", derivative_named(self.derivative))
        if self.norm not in NORMS:
            raise ValueError(f"norm: {self.norm!r} is not one of {', '.join(NORMS)}")

    def tangent_weight(self, step: int) -> float:
        return min(self.r_max, step / self.warmup_steps) if self.warmup_steps else self.r_max
