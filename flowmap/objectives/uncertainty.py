"""A learned weight of the error by its times: what is noisier or larger counts less, so that all times pull alike.

Source: EDM2, Karras et al. 2024, arXiv:2312.02696 (section 2.2, after Kendall et al. 2018); as sCM (arXiv:2410.11081, exp(w) e - w with w = -u)
and self-distilled maps (arXiv:2505.18825) use it.  u(t, s) is a branch of the student (flowmap/nets/uncertainty.py):

    exp(-u) e + u        least at u = log E[e | t, s], where it is 1 + u and its gradient in the student is that of log E[e | t, s]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowmap.flow.types import FlowMap


class TimeWeight(Protocol):
    """What errors (B,) at departures t and arrivals s, (B,), become for the mean over them to be descended."""

    @property
    def learned(self) -> bool: ...

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor: ...


@runtime_checkable
class WithLogError(Protocol):
    """A student that expects errors of itself: log_error(t, s) is (B,)."""

    def log_error(self, t: Tensor, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EvenWeight:
    """All times count as they are."""

    learned = False

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor:
        return error


@dataclass(frozen=True)
class LearnedWeight:
    """exp(-u) error + u with u(t, s) the student's log_error: its gradient in the student is that of the error, divided by exp(u)."""

    learned = True

    def __call__(self, error: Tensor, student: FlowMap, t: Tensor, s: Tensor) -> Tensor:
        assert isinstance(student, WithLogError)  # train/ gives it the branch
        u = student.log_error(t, s).to(error.dtype)
        return (-u).exp() * error + u


TIME_WEIGHTS = {"none": EvenWeight, "learned": LearnedWeight}
