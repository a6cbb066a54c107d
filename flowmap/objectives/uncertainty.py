"""Weights of the error by time: none, a power of the times, or learned.

With a learned weight, times with larger or noisier errors weigh less, so that all contribute alike. Source: EDM2,
Karras et al. 2024, arXiv:2312.02696 (section 2.2, after Kendall et al. 2018), as used by sCM (arXiv:2410.11081,
exp(w) e - w with w = -u) and by self-distilled maps (arXiv:2505.18825). u(t, s) is a branch of the student
(flowmap/nets/uncertainty.py):

    exp(-u) e + u     least at u = log E[e | t, s], where it is 1 + u and its gradient in the student is that of
                      log E[e | t, s]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from flowmap.base.ranges import Range, check_ranges
from flowmap.flow.types import FlowMap

Exponent = Annotated[float, Range(0, 8)]


class TimeWeight(Protocol):
    """Weighs errors (B,) at departures t and arrivals s, both (B,); the mean of the result is the loss."""

    @property
    def learned(self) -> bool: ...

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor: ...


@runtime_checkable
class WithLogError(Protocol):
    """A student that predicts its own error: log_error(t, s) is (B,)."""

    def log_error(self, t: Tensor, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EvenWeight:
    """The same weight at all times."""

    learned = False

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor:
        return error


@dataclass(frozen=True)
class LearnedWeight:
    """exp(-u) error + u, with u(t, s) the student's log_error.

    Its gradient in the student is that of the error, divided by exp(u).
    """

    learned = True

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor:
        assert isinstance(student, WithLogError)  # train/ gives it the branch
        u = student.log_error(t, s).to(error.dtype)
        return (-u).exp() * error + u


@dataclass(frozen=True)
class PowerWeight:
    """t^noise (1 - t)^data times the error.

    A loss of mean velocities weighs the output of a network that predicts data by 1/t, and one that predicts noise by
    1/(1 - t). {kind: power, noise: 1} and {kind: power, noise: 0, data: 1} weigh their outputs alike at all times.
    """

    noise: Exponent = 1.0
    data: Exponent = 0.0
    learned: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor:
        return error * (t**self.noise * (1 - t) ** self.data).to(error.dtype)


TIME_WEIGHTS = {"none": EvenWeight, "learned": LearnedWeight, "power": PowerWeight}
