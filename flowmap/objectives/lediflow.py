"""LeDiFlow's two losses: the variance-guided loss of the auxiliary model, and flow matching weighted by the prior's
variance.

Source: Zwick et al. 2025, arXiv:2505.20723. Its full text was not available: KL weight, free bits and the weights'
formula are settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import CountFromZero, FromZero, check_ranges
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import Loss, PathSample, Teacher, broadcast_time


class PriorNet(Protocol):
    """The auxiliary model: encode(x0) and decode(z) each return (mean, log-variance), of the code and of x1."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


class PriorStudent(Protocol):
    @property
    def net(self) -> PriorNet: ...


@dataclass(frozen=True)
class VarianceGuided(BaseObjective):
    """mean over entries of ((x0 - mu)^2 / sigma^2 + ln sigma^2) / 2, plus kl / entries times the KL of z to N(0, I).

    With kl = 1 and free_bits = 0 it is the negative ELBO per entry, up to a constant. free_bits: the nats of KL (mean
    over the batch) that each entry of z has without a penalty. kl grows to its value over the first warmup_steps. z is
    drawn with the sample's noise. Times and teacher are not used. The student's network is an auxiliary model (encode,
    decode).
    """

    kl: FromZero = 1.0
    free_bits: FromZero = 0.0
    warmup_steps: CountFromZero = 0
    diagonal: ClassVar[bool] = True
    artifact: ClassVar[str] = "prior"

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, student: PriorStudent, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        mean, logvar = student.net.encode(sample.x0)
        entries = sample.x0[0].numel()
        if mean.shape[1] > entries:
            raise ValueError("student.size: codes have more numbers than samples have entries")
        noise = sample.x1.flatten(1)[:, : mean.shape[1]]
        found = negative_log_likelihood(sample.x0, *student.net.decode(mean + (logvar / 2).exp() * noise))
        units = kl_of(mean, logvar).mean(0)
        weight = self.kl * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.kl
        value = found.mean() + weight * units.clamp(min=self.free_bits).sum() / entries
        return Loss(value, {"nll": found.mean().detach(), "kl_nats": units.sum().detach()})


def negative_log_likelihood(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """(B,): the mean over entries of ((x - mean)^2 / sigma^2 + ln sigma^2) / 2.

    Its minimum is at mean = x, with sigma^2 the mean square residual.
    """
    return ((x - mean).square() * (-logvar).exp() + logvar).flatten(1).mean(1) / 2


def kl_of(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) of every entry, in nats."""
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


class Weight(Protocol):
    """The weight of each entry of a velocity, shaped like the prior's variance."""

    def __call__(self, variance: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _ByVariance:
    """(variance + floor)^power, divided by its mean over a sample's entries, or over those of the batch.

    Where z is a condition of the network, the weights are a function of a condition, and the velocity that minimises
    the loss is the same for all of them. Otherwise the weights shift it.
    """

    floor: FromZero = 0.05
    over: str = "sample"
    power: ClassVar[float] = 0.0

    def __post_init__(self):
        check_ranges(self)
        if self.over not in ("sample", "batch"):
            raise ValueError(f"over: {self.over!r} is not one of sample, batch")

    def __call__(self, variance: Tensor) -> Tensor:
        weight = (variance + self.floor) ** self.power
        return weight / (weight.mean() if self.over == "batch" else broadcast_time(weight.flatten(1).mean(1), weight))


@dataclass(frozen=True)
class Unweighted:
    """A weight of 1 for every entry."""

    def __call__(self, variance: Tensor) -> Tensor:
        return torch.ones_like(variance)


@dataclass(frozen=True)
class InverseVariance(_ByVariance):
    """1 / (variance + floor), normalised: entries that the prior predicts well weigh most.

    Paths become straighter; after long training samples become worse (measured: docs/guide/lediflow.md).
    """

    power: ClassVar[float] = -1.0


@dataclass(frozen=True)
class ByVariance(_ByVariance):
    """variance + floor, normalised: entries that the prior predicts least weigh most."""

    power: ClassVar[float] = 1.0


WEIGHTS = {"none": Unweighted, "inverse_variance": InverseVariance, "variance": ByVariance}
