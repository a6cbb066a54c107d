"""Two losses with a priority: the step goes down the second as far as the first allows.

Source: dynamic barrier gradient descent (Gong, Liu, Liu, NeurIPS 2021), as Language Rectified Flow (arXiv:2403.16995) combines its
losses: first the reconstruction g, then the flow f. Of all directions with <d, grad g> >= phi it takes the one nearest to grad f.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def barrier_weight(first: Sequence[Tensor], second: Sequence[Tensor], phi: Tensor | float) -> Tensor:
    """lambda = max((phi - <grad f, grad g>) / ||grad g||^2, 0), a scalar; first are the gradients of g, second those of f. 0 where grad g is 0."""
    squared, inner = inner_product(first, first), inner_product(first, second)
    return torch.where(
        squared > 0, (phi - inner) / squared.clamp_min(torch.finfo(squared.dtype).tiny), torch.zeros_like(squared)
    ).clamp_min(0)


def barrier(
    first: Sequence[Tensor], least: float, value: Tensor | float, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """phi = min(alpha (g - least), beta ||grad g||^2): how fast g, now at `value`, must fall; `least` is the value that is good enough."""
    squared = inner_product(first, first)
    return torch.minimum(
        alpha * (torch.as_tensor(value, dtype=squared.dtype, device=squared.device) - least), beta * squared
    )


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The sum of the products of all numbers, a scalar."""
    total = sum((a * b).sum() for a, b in zip(first, second, strict=True))
    assert isinstance(total, Tensor)  # of at least one tensor
    return total


def lexicographic(first: Sequence[Tensor], second: Sequence[Tensor], phi: Tensor | float) -> list[Tensor]:
    """The direction grad f + lambda grad g, tensor by tensor: what an optimiser is given as the gradient of both."""
    weight = barrier_weight(first, second, phi)
    return [b + weight * a for a, b in zip(first, second, strict=True)]
