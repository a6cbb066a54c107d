"""Priors: where a path starts. x1 is shaped like x0; a learned prior may look at x0 and cond, the Gaussian one does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.types import Cond


def normal_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal draws with x's shape, device and dtype.

    Drawn in float32 on the generator's device (x's without one) and then moved, so that a CPU generator gives the same noise to every
    device and precision.
    """
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(device=x.device, dtype=x.dtype)


@dataclass(frozen=True)
class Gaussian:
    """x1 ~ N(0, I), independent of x0 and cond."""

    def sample(self, x0: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise shaped, placed and typed like x0; the same generator state gives the same noise."""
        return normal_like(x0, generator)


PRIORS = {"gaussian": Gaussian}


def chi_square(squared_norms: list[float], dims: int) -> dict[str, float]:
    """How squared norms of noise in D dimensions compare with chi^2_D, whose mean is D and std sqrt(2 D): that of their mean, in standard
    errors (z), and the probability of one as far (p, by the normal law that means of many have)."""
    norms = torch.tensor(squared_norms, dtype=torch.float64)
    z = float((norms.mean() - dims) / math.sqrt(2 * dims / len(norms)))
    mean, std = float(norms.mean()), float(norms.std()) if len(norms) > 1 else 0.0
    law = {"dims": dims, "expected_mean": float(dims), "expected_std": math.sqrt(2 * dims)}
    return {"count": len(norms), **law, "mean": mean, "std": std, "z": z, "p": math.erfc(abs(z) / math.sqrt(2))}
