"""Time samplers: distributions of the training pairs (t, s), 0 <= s <= t <= 1, where t = 1 is noise.

A sampler is called with n and returns (t, s), both (n,) float32. `density(t)` is the density of t's marginal (Dyadic
has none). Distributions of a single time have a field `pairs`: "diagonal" is s = t (flow matching), "sorted" draws
twice and takes the larger as t, "consistency" is s = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.ranges import Range, Share, check_ranges
from flowmap.flow.draws import Generator, normals, places_of, uniforms
from flowmap.flow.shares import evenly, fraction, taken
from flowmap.flow.types import TimeSampler

PAIRS = ("diagonal", "sorted", "consistency")
ENDS = ("departure", "arrival")


@runtime_checkable
class WithDensity(Protocol):
    """Time samplers with a density of t."""

    def density(self, t: Tensor) -> Tensor: ...


@runtime_checkable
class WithDensities(WithDensity, Protocol):
    """Time samplers with densities of t and s."""

    def arrival_density(self, s: Tensor) -> Tensor: ...


@runtime_checkable
class KnowsDiagonal(Protocol):
    """Time samplers that know, from a sample's index in the run, whether its s is t."""

    def diagonal_rows(self, place: Tensor) -> Tensor | None:
        """A mask (N,) of the samples with indices `place`, (N,) int64; None if it is not known."""
        ...


def diagonal_rows(times: TimeSampler, place: Tensor) -> Tensor | None:
    return times.diagonal_rows(place) if isinstance(times, KnowsDiagonal) else None


class _OneLaw:
    """Pairs from one distribution of times; a subclass defines draw, density_of_one and distribution (its CDF)."""

    pairs: str

    def draw(self, n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def density_of_one(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def distribution(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_pairs(self) -> None:
        if self.pairs not in PAIRS:
            raise ValueError(f"pairs is {self.pairs!r}; allowed: {', '.join(PAIRS)}")

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n pairs (t, s), each (n,) float32 on `device`; drawn on the generator's device."""
        t = self.draw(n, device, generator)
        if self.pairs == "diagonal":
            return t, t.clone()
        if self.pairs == "consistency":
            return t, torch.zeros_like(t)
        other = self.draw(n, device, generator)
        return torch.maximum(t, other), torch.minimum(t, other)

    def diagonal_rows(self, place: Tensor) -> Tensor:
        return torch.full_like(place, self.pairs == "diagonal", dtype=torch.bool)

    def density(self, t: Tensor) -> Tensor:
        """The density of t; for sorted pairs that of the larger of two draws, 2 p P."""
        one = self.density_of_one(t)
        return 2 * one * self.distribution(t) if self.pairs == "sorted" else one

    def arrival_density(self, s: Tensor) -> Tensor:
        """The density of s. Raises ValueError for pairs "consistency", whose s is 0."""
        if self.pairs == "consistency":
            raise ValueError("s = 0 in every pair: it has no density")
        one = self.density_of_one(s)
        return 2 * one * (1 - self.distribution(s)) if self.pairs == "sorted" else one


@dataclass(frozen=True)
class Uniform(_OneLaw):
    """Times uniform on [0, 1]."""

    pairs: str = "diagonal"

    def __post_init__(self):
        self._check_pairs()

    def draw(self, n: int, device, generator) -> Tensor:
        return uniforms(n, device, generator)

    def density_of_one(self, t: Tensor) -> Tensor:
        return ((t >= 0) & (t <= 1)).to(t.dtype)

    def distribution(self, t: Tensor) -> Tensor:
        return t.clamp(0, 1)


@dataclass(frozen=True)
class LogitNormal(_OneLaw):
    """log(t / (1 - t)) ~ N(mean, std^2): on our clock log sigma ~ N(mean, std^2), EDM's noise levels."""

    mean: Annotated[float, Range(-50, 50)] = 0.0
    std: Annotated[float, Range(0, 50, above=True)] = 1.0
    pairs: str = "diagonal"

    def __post_init__(self):
        check_ranges(self)
        self._check_pairs()

    def draw(self, n: int, device, generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * normals(n, device, generator))

    def density_of_one(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        density = torch.exp(-z * z / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), density, torch.zeros_like(t))

    def distribution(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


@dataclass(frozen=True)
class UShaped(_OneLaw):
    """Density proportional to cosh(a (t - 1/2)) on [edge, 1 - edge]: 2-rectified flow++ (arXiv:2405.20320), a = 4.

    Drawn as e = log(1 + u (e^a - 1)) / a, then e or 1 - e with probability 1/2. The formula in the paper is not
    symmetric; this one is that of its code.
    """

    a: Annotated[float, Range(0, 50, above=True)] = 4.0
    edge: Annotated[float, Range(0, 0.5, below=True)] = 1e-5
    pairs: str = "diagonal"

    def __post_init__(self):
        check_ranges(self)
        self._check_pairs()

    def draw(self, n: int, device, generator) -> Tensor:
        u, coin = uniforms(n, device, generator), uniforms(n, device, generator)
        e = (torch.log1p(u * math.expm1(self.a)) / self.a).clamp(0, 1)
        return self.edge + (1 - 2 * self.edge) * torch.where(coin < 0.5, e, 1 - e)

    def density_of_one(self, t: Tensor) -> Tensor:
        e = (t - self.edge) / (1 - 2 * self.edge)
        density = self.a * torch.cosh(self.a * (e - 0.5)) / (2 * math.sinh(self.a / 2) * (1 - 2 * self.edge))
        return torch.where((e >= 0) & (e <= 1), density, torch.zeros_like(t))

    def distribution(self, t: Tensor) -> Tensor:
        e = ((t - self.edge) / (1 - 2 * self.edge)).clamp(0, 1)
        return (torch.sinh(self.a * (e - 0.5)) / math.sinh(self.a / 2) + 1) / 2


@dataclass(frozen=True)
class Interval:
    """Interval d = sigmoid(N(mean, std^2)), s ~ U(0, 1 - d), t = s + d: Align Your Flow (arXiv:2506.14603).

    With (-0.8, 1.0), 0.14 % of the draws have d > 0.9: see Mixture for a share of exactly (1, 0).
    """

    mean: Annotated[float, Range(-50, 50)] = -0.8
    std: Annotated[float, Range(0, 50, above=True)] = 1.0

    def __post_init__(self):
        check_ranges(self)

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n pairs (t, s), each (n,) float32 on `device`; drawn on the generator's device."""
        d = torch.sigmoid(self.mean + self.std * normals(n, device, generator))
        s = uniforms(n, device, generator) * (1 - d)
        return (s + d).clamp(max=1), s

    def diagonal_rows(self, place: Tensor) -> Tensor:
        return torch.zeros_like(place, dtype=torch.bool)

    def density(self, t: Tensor) -> Tensor:
        """p(t) = int_0^t p(d) / (1 - d) dd = Phi(z) + e^(mean + std^2 / 2) Phi(z - std), z = (logit t - mean) / std.

        (1-d)^-1 = 1 + e^(logit d).
        """
        z = (torch.logit(t.clamp(0, 1)) - self.mean) / self.std
        density = torch.special.ndtr(z) + math.exp(self.mean + self.std**2 / 2) * torch.special.ndtr(z - self.std)
        return torch.where((t >= 0) & (t <= 1), density, torch.zeros_like(t))

    def arrival_density(self, s: Tensor) -> Tensor:
        """The density of s, which is distributed as 1 - t."""
        return self.density(1 - s)

    def joint_density(self, t: Tensor, s: Tensor) -> Tensor:
        """The joint density of (t, s): p(d) / (1 - d) at d = t - s, 0 outside 0 <= s < t <= 1."""
        d = t - s
        inside = (s >= 0) & (t <= 1) & (d > 0) & (d < 1)
        of_d = LogitNormal(self.mean, self.std).density(d)
        return torch.where(inside, of_d / (1 - d), torch.zeros_like(d))


@dataclass(frozen=True)
class Consistency:
    """t from the distribution `law`, s = 0: consistency training. mean and std are for "logit_normal" only."""

    law: str = "logit_normal"
    mean: Annotated[float, Range(-50, 50)] = -0.8
    std: Annotated[float, Range(0, 50, above=True)] = 1.0

    def __post_init__(self):
        check_ranges(self)
        if self.law not in ("logit_normal", "uniform"):
            raise ValueError(f"law is {self.law!r}; allowed: logit_normal, uniform")

    @property
    def _times(self) -> Uniform | LogitNormal:
        return Uniform("consistency") if self.law == "uniform" else LogitNormal(self.mean, self.std, "consistency")

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n pairs (t, 0), each (n,) float32 on `device`; drawn on the generator's device."""
        return self._times(n, device=device, generator=generator)

    def diagonal_rows(self, place: Tensor) -> Tensor:
        return torch.zeros_like(place, dtype=torch.bool)

    def density(self, t: Tensor) -> Tensor:
        return self._times.density(t)


@dataclass(frozen=True)
class Dyadic:
    """Jumps of length 1, 1/2, 1/4 ... 1/finest with equal probability, at multiples of their length.

    Source: shortcut models, arXiv:2410.12557. A share `diagonal` of the samples (flow/shares.py) has s = t instead,
    at a nonzero multiple of 1/finest.
    """

    finest: Annotated[int, Range(1, 2**20)] = 64
    diagonal: Share = 0.75

    def __post_init__(self):
        check_ranges(self)
        if self.finest & (self.finest - 1):
            raise ValueError(f"finest is {self.finest!r}; allowed: a power of two, from 1")

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n pairs (t, s), each (n,) float32 on `device`; t - s is 2^-k or 0, and t and s are exact multiples of it."""
        which, where = uniforms(n, device, generator), uniforms(n, device, generator)
        still = self.diagonal_rows(places_of(n, which.device, generator))
        jumps = torch.exp2(torch.floor(which * self.finest.bit_length()))
        count = torch.where(still, torch.full_like(jumps, self.finest), jumps)
        start = torch.floor(where * count)
        t = (start + 1) / count
        return t, torch.where(still, t, start / count)

    def diagonal_rows(self, place: Tensor) -> Tensor:
        return evenly(place, self.diagonal)


@dataclass(frozen=True)
class Mixture:
    """A base distribution, with a share `one_step` of the samples at exactly (1, 0) and a share `diagonal` with s = t.

    diagonal_at: the end of the drawn interval to use for both times, "departure" (t) or "arrival" (s), which is
    nearer to data; sampling with many short steps needs the velocity there. Shares are evenly spread over the samples
    of the run (flow/shares.py), however they are batched: they are exact to within one sample up to any step, and
    exact in every batch in which they are whole numbers.
    """

    base: TimeSampler = field(default_factory=Interval)
    one_step: Share = 0.0
    diagonal: Share = 0.0
    diagonal_at: str = "departure"

    def __post_init__(self):
        check_ranges(self)
        if self.diagonal_at not in ENDS:
            raise ValueError(f"diagonal_at is {self.diagonal_at!r}; allowed: {', '.join(ENDS)}")
        at_zero = isinstance(self.base, _OneLaw) and self.base.pairs == "consistency"
        if self.diagonal_at == "arrival" and (at_zero or not isinstance(self.base, WithDensities)):
            raise ValueError(
                f"diagonal_at is 'arrival', but {type(self.base).__name__} arrives at one time only; allowed: departure"
            )
        if self.one_step + self.diagonal > 1:
            raise ValueError(f"one_step + diagonal is {self.one_step + self.diagonal!r}; allowed: at most 1")

    def members(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (N,) of the samples with indices `place`, (N,) int64, that are (1, 0), and that are diagonal."""
        one_step = fraction(self.one_step)
        rest = min(fraction(self.diagonal) / (1 - one_step), Fraction(1)) if one_step < 1 else Fraction(0)
        jumps = evenly(place, one_step)
        return jumps, ~jumps & evenly(place - taken(place, one_step), rest)

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n pairs (t, s), each (n,) float32 on `device`; the base draws n pairs whatever the shares."""
        t, s = self.base(n, device=device, generator=generator)
        jumps, still = self.members(places_of(n, t.device, generator))
        t = torch.where(jumps, torch.ones_like(t), t)
        s = torch.where(jumps, torch.zeros_like(s), s)
        return (torch.where(still, s, t), s) if self.diagonal_at == "arrival" else (t, torch.where(still, t, s))

    def diagonal_rows(self, place: Tensor) -> Tensor | None:
        jumps, still = self.members(place)
        of_base = diagonal_rows(self.base, place)
        return None if of_base is None else still | (of_base & ~jumps)

    def density(self, t: Tensor) -> Tensor:
        """The density of t without the atom of mass one_step at t = 1: it integrates to 1 - one_step."""
        assert isinstance(self.base, WithDensity)
        at = whole = self.base.density(t)
        if self.diagonal_at == "arrival":
            assert isinstance(self.base, WithDensities)
            at = self.base.arrival_density(t)
        return (1 - self.one_step - self.diagonal) * whole + self.diagonal * at


TIMES = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "interval": Interval,
    "u_shaped": UShaped,
    "consistency": Consistency,
    "dyadic": Dyadic,
    "mixture": Mixture,
}
