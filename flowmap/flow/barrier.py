"""Descent on two losses with a priority: reduce the second as far as the first allows.

Source: dynamic barrier gradient descent (Gong, Liu, Liu, NeurIPS 2021), as Language Rectified Flow (arXiv:2403.16995)
combines its losses: first the reconstruction g, then the flow f. The step direction is the one nearest to grad f among
those with <d, grad g> >= phi.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def barrier_weight(first: Sequence[Tensor], second: Sequence[Tensor], phi: Tensor | float) -> Tensor:
    """The scalar lambda = max((phi - <grad f, grad g>) / ||grad g||^2, 0); 0 if grad g is 0.

    `first` are the gradients of g, `second` those of f.
    """
    squared, inner = inner_product(first, first), inner_product(first, second)
    weight = (phi - inner) / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    return torch.where(squared > 0, weight, torch.zeros_like(squared)).clamp_min(0)


def barrier(
    first: Sequence[Tensor], least: float, value: Tensor | float, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """phi = min(alpha (g - least), beta ||grad g||^2): how fast g must decrease from `value`; `least` is its target."""
    squared = inner_product(first, first)
    excess = torch.as_tensor(value, dtype=squared.dtype, device=squared.device) - least
    return torch.minimum(alpha * excess, beta * squared)


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The scalar product of two lists of tensors."""
    total = sum((a * b).sum() for a, b in zip(first, second, strict=True))
    assert isinstance(total, Tensor)  # the lists are not empty
    return total


def lexicographic(first: Sequence[Tensor], second: Sequence[Tensor], phi: Tensor | float) -> list[Tensor]:
    """The combined gradient grad f + lambda grad g for the optimiser, tensor by tensor."""
    weight = barrier_weight(first, second, phi)
    return [b + weight * a for a, b in zip(first, second, strict=True)]
