"""The settings of objectives whose residual holds a derivative that is warmed up and normalised (arXiv:2410.11081, arXiv:2506.14603)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.distance import NORMS


@dataclass(frozen=True)
class Tangent:
    """The derivative's weight is r = min(r_max, step / warmup_steps); the residual g becomes g / (||g|| + c) per sample.

    norm is "l2", "rms" (l2 / sqrt of the dimension) or "none". derivative: how d/dt or d/ds is taken: "ride", "forward" or "difference"
    (flow/derivative.py).
    """

    warmup_steps: int = 10_000
    r_max: float = 0.99
    norm: str = "l2"
    c: float = 0.1
    derivative: str = "ride"
    diagonal: ClassVar[bool] = False

    def __post_init__(self):
        if self.derivative not in DERIVATIVES:
            raise ValueError(f"derivative: {self.derivative!r} is not one of {', '.join(DERIVATIVES)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm: {self.norm!r} is not one of {', '.join(NORMS)}")
        if not 0 <= self.r_max <= 1:
            raise ValueError(f"r_max: {self.r_max} must lie in [0, 1]")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be 0 or more")
        if not self.c >= 0:
            raise ValueError(f"c: {self.c} must be 0 or more")

    def tangent_weight(self, step: int) -> float:
        return min(self.r_max, step / self.warmup_steps) if self.warmup_steps else self.r_max
