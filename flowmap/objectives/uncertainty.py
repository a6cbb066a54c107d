"""A learned weight of the error at each time: times with larger or noisier errors weigh less, so that all contribute
alike.

Source: EDM2, Karras et al. 2024, arXiv:2312.02696 (section 2.2, after Kendall et al. 2018), as used by sCM
(arXiv:2410.11081, exp(w) e - w with w = -u) and by self-distilled maps (arXiv:2505.18825). u(t, s) is a branch of the
student (flowmap/nets/uncertainty.py):

    exp(-u) e + u     least at u = log E[e | t, s], where it is 1 + u and its gradient in the student is that of
                      log E[e | t, s]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowmap.flow.types import FlowMap


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


TIME_WEIGHTS = {"none": EvenWeight, "learned": LearnedWeight}
