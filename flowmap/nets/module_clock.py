"""The clocks on which a module of one's own states its time: MODULE_CLOCKS, as settings of nets/module.py.

Ours is t = 0 for data and t = 1 for noise. Each gives, for our t, the coefficients of the module's state
a x0 + b noise and the time that the module is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import InsideOne, Positive, Range, Share, check_ranges
from flowmap.flow.clock import TableClock
from flowmap.flow.path import Coefficients, wide


class ModuleClock(Protocol):
    """The settings of a clock, a dataclass. flows: velocities are defined on it. towards_data: as its time grows."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    flows: ClassVar[bool]
    towards_data: ClassVar[bool]

    def build(self) -> Clock: ...


class Clock(Protocol):
    """t_min: the least of our times at which predicted data determines a velocity."""

    t_min: float

    def at(self, t: Tensor) -> tuple[Coefficients, Tensor]: ...


class FlowTime:
    """The state (1 - t) x0 + t noise. The module is given unit x t or, backwards, unit x (1 - t)."""

    t_min = 0.0

    def __init__(self, unit: float, backwards: bool):
        self.unit, self.backwards = unit, backwards

    def at(self, t: Tensor) -> tuple[Coefficients, Tensor]:
        t = wide(t)
        return Coefficients(1 - t, t), self.unit * (1 - t if self.backwards else t)


class SigmaTime:
    """The state x0 + sigma noise with sigma = t / (1 - t), kept in a range; the module is given sigma."""

    def __init__(self, low: float, high: float):
        self.t_min, self.t_max = low / (1 + low), high / (1 + high)

    def at(self, t: Tensor) -> tuple[Coefficients, Tensor]:
        t = wide(t).clamp(self.t_min, self.t_max)
        sigma = t / (1 - t)
        return Coefficients(torch.ones_like(t), sigma), sigma


@dataclass(frozen=True)
class Flow:
    """Flow matching, time 0 at the data and `unit` at noise."""

    unit: Positive = 1.0
    flows: ClassVar[bool] = True
    towards_data: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)

    def build(self) -> FlowTime:
        return FlowTime(self.unit, backwards=False)


@dataclass(frozen=True)
class Reversed:
    """Flow matching, time 0 at noise and `unit` at the data; its velocity points towards the data."""

    unit: Positive = 1.0
    flows: ClassVar[bool] = True
    towards_data: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def build(self) -> FlowTime:
        return FlowTime(self.unit, backwards=True)


@dataclass(frozen=True)
class DDPM:
    """A variance-preserving table of `steps` places from data (0) to noise (steps - 1).

    betas: linear from beta_start to beta_end; scaled_linear (the same in their square roots); cosine
    (arXiv:2102.09672), which needs neither end. alphas_cumprod: the products of the table itself, in their place.
    """

    steps: Annotated[int, Range(2, 1_000_000)] = 1000
    betas: str = "linear"
    beta_start: InsideOne = 1e-4
    beta_end: InsideOne = 0.02
    alphas_cumprod: tuple[Share, ...] = ()
    flows: ClassVar[bool] = False
    towards_data: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)
        if self.betas not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"betas: {self.betas!r} is not one of linear, scaled_linear, cosine")
        if self.alphas_cumprod:
            self.build()

    def build(self) -> TableClock:
        with torch.device("cpu"):
            return TableClock(self._table())

    def _table(self) -> Tensor:
        if self.alphas_cumprod:
            return torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        if self.betas == "cosine":
            at = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
            level = torch.cos((at + 0.008) / 1.008 * torch.pi / 2) ** 2
            return (1 - (1 - level[1:] / level[:-1]).clamp(max=0.999)).cumprod(0)
        power = 2 if self.betas == "scaled_linear" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        return (1 - torch.linspace(*ends, self.steps, dtype=torch.float64) ** power).cumprod(0)


@dataclass(frozen=True)
class Sigma:
    """EDM's clock: the state is x0 + sigma noise, and the module is given sigma, between sigma_min and sigma_max."""

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    flows: ClassVar[bool] = False
    towards_data: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min} must be below sigma_max, {self.sigma_max}")

    def build(self) -> SigmaTime:
        return SigmaTime(self.sigma_min, self.sigma_max)


MODULE_CLOCKS = {"flow": Flow, "reversed": Reversed, "ddpm": DDPM, "sigma": Sigma}
