"""What a network's output stands for: the mean velocity F itself, or a prediction of the data.

Source: pixel MeanFlow, Lu et al. 2026, arXiv:2601.22158: in the space of pixels the data lies on a low-dimensional
manifold and the velocity does not, so the network's output is D and the loss remains one of velocities:

    F(x, t, s) = (x - D(x, t, s)) / max(t, LEAST),   f(x, t, s) = x - (t - s) F

At s = 0 and t >= LEAST, f is D itself. An exact network gives the same flow map as one that predicts F. LEAST bounds
the derivatives at the data; below it D stands for x - LEAST F.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from flowmap.flow.types import broadcast_time

PREDICTIONS = ("velocity", "data")
LEAST = 0.05  # a choice made here


@runtime_checkable
class Predicts(Protocol):
    """A network that states what its output stands for."""

    prediction: str


def check_prediction(value: str) -> None:
    """Raise ValueError unless it is one of PREDICTIONS."""
    if value not in PREDICTIONS:
        raise ValueError(f"prediction: {value!r} is not one of {', '.join(PREDICTIONS)}")


def as_velocity(prediction: str, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The mean velocity that the output (B, ...) of a network at (x, t) stands for, finite at every t in [0, 1]."""
    if prediction == "velocity":
        return out
    return (x - out) / broadcast_time(t.clamp_min(LEAST), x)
