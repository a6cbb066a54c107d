"""Priors: the distribution of x1, Gaussian or learned. A learned prior depends on x0 through a code z.

Learned priors follow LeDiFlow (Zwick et al. 2025, arXiv:2505.20723): x1 = mu(z) + k sigma(z) eps, with z from the
encoder of x0 in training and from a code sampler otherwise. `Learned` is the setting in a recipe, `LearnedPrior` the
object with the networks that is built from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.precision import without_autocast
from flowmap.base.ranges import Calls, Positive, Range, check_ranges
from flowmap.base.schema import renamed
from flowmap.flow.draws import Generator, for_codes, normal_like, normal_rows
from flowmap.flow.parts import BasePrior
from flowmap.flow.types import Cond, Prior, RecipeView

BLOCK = 256  # samples whose start points are drawn at once; a multiple of 16, in which torch draws normal numbers


@dataclass(frozen=True)
class Start:
    """Start points of paths.

    x1 is (B, ...). conditioning: extra conditions for the network, {} or {"z": (B, Z)}. variance: that of the entries
    of x1 given z; None means 1.
    """

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
    """Settings of the code distribution at sampling."""


@dataclass(frozen=True)
class NormalCodes:
    """z ~ N(0, I), the target of the KL term."""


@dataclass(frozen=True)
class MixtureCodes:
    """z from a mixture of `components` Gaussians with full covariance, fitted to codes of the training data.

    The fit is scikit-learn's EM with random state `seed`.
    """

    components: Annotated[int, Range(1, 10_000)] = 16
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class FlowCodes:
    """z from a flow, sampled with `steps` Heun steps.

    A separate recipe (with data of kind codes) trains the flow; overrides: key=value settings for that recipe.
    """

    recipe: str
    steps: Calls = 8
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(self)


CODE_SAMPLERS = {"normal": NormalCodes, "mixture": MixtureCodes, "flow": FlowCodes}


@dataclass(frozen=True)
class Learned(BasePrior):
    """x1 = mu(z) + scale sigma(z) eps, with the auxiliary model that `recipe` trains (objective variance_guided).

    conditioning: whether the network is also conditioned on z. z: the code distribution at sampling; in training codes
    come from the encoder. overrides: key=value settings for the recipe.
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
    """A code sampler: standard normal noise (B, Z + 1) -> z (B, Z)."""

    def __call__(self, noise: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str) -> Codes: ...

    def double(self) -> Codes: ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which it can be rebuilt."""
        ...


class LearnedPrior(BasePrior):
    """A learned prior: a frozen auxiliary model and a code sampler. It is not an nn.Module.

    model: encode(x0) -> (mean, log-variance) of z, each (B, Z); decode(z) -> (mean, log-variance) of x1, each shaped
    like x0. codes: standard normal noise (B, Z + 1) -> z (B, Z).
    """

    learned: ClassVar[bool] = True

    def __init__(self, model, codes: Codes, size: int, *, scale: float = 1.0, conditioning: bool = True):
        self.model, self.codes, self.size, self.scale, self.conditioning = model, codes, size, scale, conditioning

    @torch.no_grad()
    def encode(self, x0: Tensor, generator: Generator | None = None) -> Tensor:
        """The codes of x0 (B, ...): drawn from the posterior, or its mean without a generator."""
        with without_autocast(x0.device):
            mean, logvar = self.model.encode(x0)
        return mean if generator is None else mean + (logvar / 2).exp() * normal_like(mean, generator)

    @torch.no_grad()
    def place(self, z: Tensor, noise: Tensor) -> Start:
        """The start points for codes z (B, Z) and noise eps (B, ...)."""
        with without_autocast(z.device):
            mean, logvar = self.model.decode(z)
        std = self.scale * (logvar / 2).exp()
        return Start(mean + std * noise, {"z": z} if self.conditioning else {}, std.square())

    def start(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start:
        """Start points for training: the code is cond["z"] or the encoder's; eps is the Gaussian prior's draw."""
        z = cond["z"] if cond and "z" in cond else self.encode(x0, for_codes(generator))
        return self.place(z, normal_like(x0, generator))

    def sample(self, x0: Tensor, cond: Cond | None = None, generator: Generator | None = None) -> Tensor:
        return self.start(x0, cond, generator).x1

    def to(self, device: torch.device | str) -> LearnedPrior:
        for part in (self.model, self.codes):
            part.to(device)
        return self

    def exact(self) -> LearnedPrior:
        """A float64 copy on the CPU. Its start points, rounded to float32, do not depend on the batch size."""
        model, codes = (copy.deepcopy(part).to("cpu").double() for part in (self.model, self.codes))
        return LearnedPrior(model, codes, self.size, scale=self.scale, conditioning=self.conditioning)


@runtime_checkable
class WithStart(Protocol):
    """A prior that provides conditioning and variance besides x1."""

    def start(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start: ...


def start_of(prior: Prior, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Start:
    """Start points for training from any prior, including one with `sample` only."""
    if isinstance(prior, WithStart):
        return prior.start(x0, cond, generator)
    return Start(prior.sample(x0, cond, generator))


def starts(
    prior: LearnedPrior | None,
    shape: tuple[int, ...],
    num: int,
    generator: torch.Generator,
    *,
    z: Tensor | None = None,
) -> Start:
    """Start points of `num` samples, float32 on the CPU. That of sample i depends on the seed, not on `num`.

    A prior of None is the Gaussian one. eps are the draws that the Gaussian prior would make; codes come from a second
    generator, unless z (num, Z) is given.
    """
    parts = list(start_blocks(prior, shape, num, generator, z=z))
    if not parts:
        return Start(torch.zeros(0, *shape))
    if len(parts) == 1:
        return parts[0]
    conditioning = {key: torch.cat([part.conditioning[key] for part in parts]) for key in parts[0].conditioning}
    variances = [part.variance for part in parts if part.variance is not None]
    return Start(torch.cat([part.x1 for part in parts]), conditioning, torch.cat(variances) if variances else None)


def start_blocks(
    prior: LearnedPrior | None,
    shape: tuple[int, ...],
    num: int,
    generator: torch.Generator,
    *,
    z: Tensor | None = None,
) -> Iterator[Start]:
    """The same start points, BLOCK after BLOCK of samples, so that no more than these are held at once."""
    codes = None if prior is None else for_codes(generator)
    for i in range(0, num, BLOCK):
        count = min(BLOCK, num - i)
        noise = normal_rows((count, *shape), generator)
        if prior is None or codes is None:
            yield Start(noise)
        else:
            coarse = normal_rows((count, prior.size + 1), codes)
            yield placed(prior, noise, coarse, z=None if z is None else z[i : i + count])


@torch.no_grad()
def placed(
    prior: LearnedPrior, noise: Tensor, coarse: Tensor, *, z: Tensor | None = None, batch_size: int = 256
) -> Start:
    """Start points for noise (N, ...) and codes z, or codes sampled from coarse (N, Z + 1); by batches, on the CPU."""
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
    """The conditioning of those rows, on that device."""
    return {key: value[rows].to(device) for key, value in start.conditioning.items()}


def chi_square(squared_norms: list[float], dims: int) -> dict[str, float]:
    """Compare squared norms of noise in D dimensions with chi^2_D, which has mean D and std sqrt(2 D).

    z is the deviation of their mean in standard errors; p is the two-sided p-value by the central limit theorem.
    """
    norms = torch.tensor(squared_norms, dtype=torch.float64)
    z = float((norms.mean() - dims) / math.sqrt(2 * dims / len(norms)))
    mean, std = float(norms.mean()), float(norms.std()) if len(norms) > 1 else 0.0
    law = {"dims": dims, "expected_mean": float(dims), "expected_std": math.sqrt(2 * dims)}
    return {"count": len(norms), **law, "mean": mean, "std": std, "z": z, "p": math.erfc(abs(z) / math.sqrt(2))}
