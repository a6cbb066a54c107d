"""Distances between predictions and targets, one number per sample, and two helpers that turn a gradient into a loss.

All reductions are over every dimension except the first, in float32 or better; results are (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import Positive, Range, check_ranges
from flowmap.flow.types import broadcast_time

NORMS = ("l2", "rms", "none")


class Distance(Protocol):
    """A function of (prediction, target), both (B, ...), that returns a loss (B,) with gradients for the prediction."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Squared:
    """||prediction - target||^2 of each sample; with `mean`, divided by the number of elements D."""

    mean: bool = True

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = _flat(prediction - target)
        total = difference.square().sum(1)
        return total / difference.shape[1] if self.mean else total


@dataclass(frozen=True)
class PseudoHuber:
    """(sqrt(||prediction - target||^2 + k^2) - k) / D with k = scale D: 2-rectified flow++ (arXiv:2405.20320).

    k is proportional to D, not to sqrt(D) as in iCT. For large differences the gradient has length 1 / D, for small
    ones it is that of ||.||^2 / (2 k D).
    """

    scale: Positive = 0.00054

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = _flat(prediction - target)
        num_elements = difference.shape[1]
        k = self.scale * num_elements
        squared = difference.square().sum(1)
        # sqrt(q + k^2) - k without cancellation for q << k^2
        return squared / ((squared + k * k).sqrt() + k) / num_elements


@dataclass(frozen=True)
class Adaptive:
    """sg(w) e with e = ||prediction - target||^2 and w = 1 / (e + offset)^power: MeanFlow's loss (arXiv:2505.13447).

    power 0 is Squared.
    """

    power: Annotated[float, Range(0, 100)] = 1.0
    offset: Positive = 1e-3
    mean: bool = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = Squared(self.mean)(prediction, target)
        return adaptive_weight(error, self.power, self.offset) * error


def adaptive_weight(error: Tensor, power: float = 1.0, offset: float = 1e-3) -> Tensor:
    """1 / (error + offset)^power, without gradient; error is (B,) and not negative."""
    return (error.detach() + offset) ** -power


def gradient_as_target(F: Tensor, g: Tensor) -> Tensor:
    """||F - sg(F - g)||^2 of each sample: its value is ||g||^2, its gradient in F is 2 g.

    F and g are (B, ...), the result (B,).
    """
    target = (_wide(F) - _wide(g)).detach()
    return _flat(_wide(F) - target).square().sum(1)


def normalise(g: Tensor, c: float = 0.1, norm: str = "l2") -> Tensor:
    """g / (||g|| + c) with one norm per sample, so that its norm is below 1. Same shape and dtype as g.

    norm "l2" is the Euclidean length over all dimensions except the first, "rms" is that length over sqrt(D), and
    "none" returns g. Source: AYF, arXiv:2506.14603.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; allowed: {', '.join(NORMS)}")
    if c < 0:
        raise ValueError(f"c is {c!r}; allowed: from 0")
    if norm == "none":
        return g
    flat = _flat(g)
    length = torch.linalg.vector_norm(flat, dim=1)
    if norm == "rms":
        length = length / flat.shape[1] ** 0.5
    return (_wide(g) / broadcast_time(length + c, g)).to(g.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def _flat(x: Tensor) -> Tensor:
    """x as (B, D) in float32 or better; (B,) counts as D = 1."""
    return _wide(x).reshape(x.shape[0], -1)


DISTANCES = {"squared": Squared, "pseudo_huber": PseudoHuber, "adaptive": Adaptive}
