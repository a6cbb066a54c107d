"""Time that passes by training steps alone: a clock whose hands an objective moves."""

from __future__ import annotations

from dataclasses import dataclass

from flowmap.flow.types import Loss
from flowmap.objectives import FlowMatching


class Hands:
    """A clock's hands, which move when they are moved."""

    at = 0.0

    def __call__(self) -> float:
        return self.at


HANDS = Hands()


@dataclass(frozen=True)
class Slow(FlowMatching):
    """Flow matching in which every step takes `cost` seconds of the clock.

    From step `breaks_at` on, its loss is not finite (-1: never).
    """

    cost: float = 1.0
    breaks_at: int = -1

    def __call__(self, student, teacher, sample, step) -> Loss:
        HANDS.at += self.cost
        loss = super().__call__(student, teacher, sample, step)
        return Loss(loss.value * (float("nan") if 0 <= self.breaks_at <= step else 1.0), loss.logs)
