"""Priors: where a path starts. x1 is shaped like x0; a learned prior looks at x0 through its code z, the Gaussian one does not.

Learned priors: LeDiFlow (Zwick et al. 2025, arXiv:2505.20723): x1 = mu(z) + k sigma(z) eps, with z from the encoder of x0 in training and
from a z-sampler otherwise.  `Learned` is what a recipe says; `LearnedPrior` is built of it and holds the networks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Positive, Range, check_ranges
from flowmap.base.schema import renamed
from flowmap.flow.draws import Generator, for_codes, normal_like, normal_rows
from flowmap.flow.parts import BasePrior
from flowmap.flow.types import Cond, Prior, RecipeView


@dataclass(frozen=True)
class Start:
    """Where paths start: x1 (B, ...), what the network is told of it ({} or {"z": (B, Z)}), and the variance of x1's entries given z
    (None: it is 1)."""

    x1: Tensor
    conditioning: Cond = field(default_factory=dict)
    variance: Tensor | None = None


@dataclass(frozen=True)
class Gaussian(BasePrior):
    """x1 ~ N(0, I), independent of x0 and cond."""

    def sample(self, x0: Tensor, cond: Cond | None = None, generator: Generator | None = None) -> Tensor:
        """Noise shaped, placed and typed like x0; the same generator state gives the same noise."""
        return normal_like(x0, generator)


class CodeSampler(Protocol):
    """Says where codes come from at sampling."""


@dataclass(frozen=True)
class NormalCodes:
    """z ~ N(0, I), what the KL term pulls all codes together towards."""


@dataclass(frozen=True)
class MixtureCodes:
    """z from a mixture of `components` Gaussians of full covariance, fitted (EM, scikit-learn, `seed`) to codes of the training data."""

    components: Annotated[int, Range(1, 10_000)] = 16
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class FlowCodes:
    """z from a flow that a recipe of its own (data of kind codes) trains, by `steps` Heun steps of it; overrides: key=value for that recipe."""

    recipe: str
    steps: Calls = 8
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(self)


CODE_SAMPLERS = {"normal": NormalCodes, "mixture": MixtureCodes, "flow": FlowCodes}


@dataclass(frozen=True)
class Learned(BasePrior):
    """x1 = mu(z) + scale sigma(z) eps, by the auxiliary model that `recipe` trains (objective variance_guided).

    conditioning: the network is given z as well. z: where codes come from at sampling; in training they are the encoder's. overrides: key=value for
    the recipe.
    """

    recipe: str
    scale: Positive = 1.0
    conditioning: bool = field(default=True, metadata=renamed("told"))
    z: CodeSampler = NormalCodes()
    overrides: tuple[str, ...] = ()
    learned: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def check(self, recipe: RecipeView) -> None:
        if recipe.artifact != "student":
            raise ValueError("prior: an autoencoder or an auxiliary model is trained without one; leave it gaussian")
        if recipe.data.conditional:
            raise ValueError(
                "prior: the codes of a learned prior know no conditions, so that it wants data.conditional: false"
            )
        if any(metric.normal_noise for metric in recipe.metrics):
            raise ValueError(
                "metrics: inversion compares noise with N(0, I), and the prior is a learned one; leave it out"
            )


PRIORS = {"gaussian": Gaussian, "learned": Learned}


class Codes(Protocol):
    """A built z-sampler: noise (B, Z + 1), standard normal -> z (B, Z)."""

    def __call__(self, noise: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str) -> Codes: ...

    def double(self) -> Codes: ...

    def tensors(self) -> dict[str, Tensor]:
        """What it is built of again."""
        ...


class LearnedPrior(BasePrior):
    """A built prior: an auxiliary model and a z-sampler, frozen, held without being a module.

    model: encode(x0) -> (mean, log-variance) of z, each (B, Z); decode(z) -> (mean, log-variance) of x1, each shaped like x0.
    codes: noise (B, Z + 1), standard normal -> z (B, Z).
    """

    learned: ClassVar[bool] = True

    def __init__(self, model, codes: Codes, size: int, *, scale: float = 1.0, conditioning: bool = True):
        self.model, self.codes, self.size, self.scale, self.conditioning = model, codes, size, scale, conditioning

    @torch.no_grad()
    def encode(self, x0: Tensor, generator: Generator | None = None) -> Tensor:
        """A code of each x0 (B, ...), drawn from the posterior; its mean where there is no generator."""
        with _without_autocast(x0):
            mean, logvar = self.model.encode(x0)
        return mean if generator is None else mean + (logvar / 2).exp() * normal_like(mean, generator)

    @torch.no_grad()
    def place(self, z: Tensor, noise: Tensor) -> Start:
        """The start of the path whose code is z (B, Z) and whose noise is eps (B, ...)."""
        with _without_autocast(z):
            mean, logvar = self.model.decode(z)
        std = self.scale * (logvar / 2).exp()
        return Start(mean + std * noise, {"z": z} if self.conditioning else {}, std.square())

    def start(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start:
        """Training's start: the code is cond["z"] or else the encoder's; eps is what the Gaussian prior would draw."""
        z = cond["z"] if cond and "z" in cond else self.encode(x0, for_codes(generator))
        return self.place(z, normal_like(x0, generator))

    def sample(self, x0: Tensor, cond: Cond | None = None, generator: Generator | None = None) -> Tensor:
        return self.start(x0, cond, generator).x1

    def to(self, device: torch.device | str) -> LearnedPrior:
        for part in (self.model, self.codes):
            part.to(device)
        return self

    def exact(self) -> LearnedPrior:
        """Itself in float64 on the CPU: rounded to float32, its starts do not depend on how many are computed at once."""
        model, codes = (copy.deepcopy(part).to("cpu").double() for part in (self.model, self.codes))
        return LearnedPrior(model, codes, self.size, scale=self.scale, conditioning=self.conditioning)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Inside, where paths start is computed as precisely as it is given, whatever the training's precision."""
    return torch.autocast(x.device.type, enabled=False)


@runtime_checkable
class WithStart(Protocol):
    """A prior that says more of a start than x1."""

    def start(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start: ...


def start_of(prior: Prior, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start:
    """Training's start by any prior, one that has no more than `sample` included."""
    return (
        prior.start(x0, cond, generator) if isinstance(prior, WithStart) else Start(prior.sample(x0, cond, generator))
    )


@torch.no_grad()
def starts(
    prior: LearnedPrior | None,
    shape: tuple[int, ...],
    num: int,
    generator: torch.Generator,
    *,
    z: Tensor | None = None,
    batch_size: int = 256,
) -> Start:
    """Where `num` samples start, float32 on the CPU: a function of the generator's seed, and sample i's whatever `num` is. None is the
    Gaussian prior.

    eps are the draws that the Gaussian prior would make; codes are drawn beside them, unless z (num, Z) is given.
    """
    noise = normal_rows((num, *shape), generator)
    if prior is None:
        return Start(noise)
    coarse = normal_rows((num, prior.size + 1), for_codes(generator))
    return placed(prior, noise, coarse, z=z, batch_size=batch_size)


@torch.no_grad()
def placed(
    prior: LearnedPrior, noise: Tensor, coarse: Tensor, *, z: Tensor | None = None, batch_size: int = 256
) -> Start:
    """The starts of that noise (N, ...) and of the codes that coarse (N, Z + 1) or z stands for, batch by batch, on the CPU."""
    where = next(prior.model.parameters())
    like = dict(device=where.device, dtype=where.dtype)
    parts = []
    for i in range(0, len(noise), batch_size):
        rows = slice(i, i + batch_size)
        code = prior.codes(coarse[rows].to(**like)) if z is None else z[rows].to(**like)
        parts.append(prior.place(code, noise[rows].to(**like)))
    conditioning = {
        key: torch.cat([part.conditioning[key].float().cpu() for part in parts])
        for key in (parts[0].conditioning if parts else {})
    }
    x1, variance = (
        torch.cat([getattr(part, name).float().cpu() for part in parts]) if parts else noise
        for name in ("x1", "variance")
    )
    return Start(x1, conditioning, variance)


def conditioning_rows(start: Start, rows: slice | Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """What the network is told at those rows, on that device."""
    return {key: value[rows].to(device) for key, value in start.conditioning.items()}


def chi_square(squared_norms: list[float], dims: int) -> dict[str, float]:
    """How squared norms of noise in D dimensions compare with chi^2_D, whose mean is D and std sqrt(2 D): that of their mean, in standard
    errors (z), and the probability of one as far (p, by the normal law that means of many have)."""
    norms = torch.tensor(squared_norms, dtype=torch.float64)
    z = float((norms.mean() - dims) / math.sqrt(2 * dims / len(norms)))
    mean, std = float(norms.mean()), float(norms.std()) if len(norms) > 1 else 0.0
    law = {"dims": dims, "expected_mean": float(dims), "expected_std": math.sqrt(2 * dims)}
    return {"count": len(norms), **law, "mean": mean, "std": std, "z": z, "p": math.erfc(abs(z) / math.sqrt(2))}
