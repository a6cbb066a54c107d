"""Power-function averages of weights (EMA) and their post-hoc reconstruction.

Source: EDM2 (Karras et al. 2024, arXiv:2312.02696), section 3 and appendix C. The average at step n of a trace theta_1,
theta_2, ... weighs theta_i by p(i; n) = (gamma + 1) i^gamma / n^(gamma + 1): a fixed fraction of the run, whatever its
length. `std` is the width of that profile relative to the run's length (0.05 is gamma 16.97), `exponent` is gamma. Pure
numbers: no network here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_STD = 1 / math.sqrt(12)
"""The std of exponent 0, a plain mean over the whole run."""


def std_from_exponent(exponent: float) -> float:
    """The profile's std over the run's length: sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))."""
    if not exponent >= 0:
        raise ValueError(f"exponent is {exponent!r}; allowed: from 0")
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def exponent_from_std(std: float) -> float:
    """The exponent gamma >= 0 whose profile has this std, to rounding; std 0.05 is 16.97, 0.10 is 6.94."""
    if not 0 < std <= LARGEST_STD:
        raise ValueError(f"std is {std!r}; allowed: above 0, at most 1/sqrt(12) = {LARGEST_STD:.4f}")
    low, high = 0.0, 1 / std  # std falls as gamma grows, and is below 1 / gamma
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if std_from_exponent(middle) > std else (low, middle)
    return (low + high) / 2


def power_beta(step: int, exponent: float) -> float:
    """(1 - 1/step)^(gamma + 1): the share of the old average at this step in average = beta average + (1 - beta) theta.

    Steps count from 1, where beta is 0: the average starts as theta_1 and no initial value matters.
    """
    if step < 1:
        raise ValueError(f"step is {step!r}; allowed: from 1")
    return (1 - 1 / step) ** (exponent + 1)


def posthoc_coefficients(
    steps: Sequence[int], stds: Sequence[float], *, target_step: int | None = None, target_std: float
) -> Tensor:
    """Weights (K,) of snapshots, summing to 1, that approximate the average of width `target_std` at `target_step`.

    Snapshot i is an average of width stds[i] at steps[i]; target_step defaults to the last of `steps`. The weights
    minimise the squared difference of the profiles over time under the constraint that they sum to 1, in float64.
    Raises a ValueError for lists of different lengths, or a target_step after every snapshot.
    """
    if len(steps) != len(stds) or not steps:
        raise ValueError(f"steps and stds must have the same length, above 0, got {len(steps)} and {len(stds)}")
    target_step = max(steps) if target_step is None else target_step
    if not 1 <= target_step <= max(steps) or min(steps) < 1:
        allowed = f"steps from 1, target_step in [1, {max(steps)}]"
        raise ValueError(f"target_step is {target_step!r}, steps {list(steps)!r}; allowed: {allowed}")
    ends = torch.tensor([*steps, target_step], dtype=torch.float64)
    exponents = torch.tensor([exponent_from_std(std) for std in [*stds, target_std]], dtype=torch.float64)
    products = _inner_products(ends / target_step, exponents)
    count = len(steps)
    # minimise w' A w - 2 w' b with sum(w) = 1 by a Lagrange multiplier; lstsq accepts identical snapshots
    system = torch.ones(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = products[:count, :count]
    system[count, count] = 0
    right = torch.cat([products[:count, count], torch.ones(1, dtype=torch.float64)])
    weights = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:count, 0]
    return weights / weights.sum()


def _inner_products(ends: Tensor, exponents: Tensor) -> Tensor:
    """The (K, K) matrix of int p_i p_j dt of profiles that end at `ends`.

    An entry is (gi + 1) (gj + 1) / (gi + gj + 1) (m / n)^(g of the later) / n, with m <= n the two ends.
    """
    g_i, g_j = exponents[:, None], exponents[None, :]
    end_i, end_j = ends[:, None], ends[None, :]
    ratio = torch.minimum(end_i, end_j) / torch.maximum(end_i, end_j)
    later = torch.where(end_i > end_j, g_i, g_j)
    return (g_i + 1) * (g_j + 1) / (g_i + g_j + 1) * ratio**later / torch.maximum(end_i, end_j)
