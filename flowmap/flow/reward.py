"""Rewards of samples, and the weights of particles by which a law is tilted: p(x) exp(scale r(x)) / Z."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.flow.draws import Generator, RowGenerator
from flowmap.flow.types import Cond

LOST = -1e30  # the log weight of a particle whose reward is not finite


class Reward(Protocol):
    """r(x, cond), (B,): how good each sample x (B, ...) is. Samples of latents are decoded to pictures first.

    Gradients are taken if it has them.
    """

    def __call__(self, x: Tensor, cond: Cond | None) -> Tensor: ...


@runtime_checkable
class WithPictures(Protocol):
    """A student that decodes its samples to pictures."""

    def pictures(self, x: Tensor) -> Tensor: ...


def pictures_of(student: Any, x: Tensor) -> Tensor:
    """Samples x as pictures: decoded by the student, with grad, where they are latents; otherwise x itself."""
    return student.pictures(x) if isinstance(student, WithPictures) else x


def rewards_of(reward: Reward, student: Any, x: Tensor, cond: Cond | None) -> Tensor:
    """The rewards (B,) of samples x (B, ...). Raises ValueError unless there is one number a sample."""
    found = reward(pictures_of(student, x), cond)
    if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"reward: returns {what} for {len(x)} samples; wants a tensor of {len(x)} numbers")
    return found


def uniform_rows(rows: int, num: int, device: torch.device, generator: Generator | None) -> Tensor:
    """(rows, num) float64 draws in [0, 1), drawn on the generator's device, then moved."""
    if isinstance(generator, RowGenerator):
        return generator.uniform((num,)).double().to(device)
    where = device if generator is None else generator.device
    return torch.rand(rows, num, generator=generator, device=where).double().to(device)


def effective(log_weights: Tensor) -> Tensor:
    """The effective number of particles (B,), 1 / sum of the squared normalised weights; log_weights (B, n)."""
    return 1 / torch.softmax(log_weights, 1).square().sum(1)


def resampled(log_weights: Tensor, uniform: Tensor, num: int) -> Tensor:
    """Places (B, num) of particles, each as often as its weight says: systematic resampling.

    log_weights (B, n); uniform (B, 1), one draw for each row. Particle j is drawn num w_j times on average, and at
    least as often as the whole part of that.
    """
    total = torch.softmax(log_weights, 1).cumsum(1)
    points = (torch.arange(num, device=total.device) + uniform) / num
    return torch.searchsorted(total / total[:, -1:], points.to(total.dtype)).clamp_max(log_weights.shape[1] - 1)
