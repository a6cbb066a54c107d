"""EDM's preconditioning on our clock: the velocity of a network that was trained as an EDM or EDM2 denoiser.

Source: Karras et al. 2022, arXiv:2206.00364, table 1. The denoiser D(x, sigma) = c_skip x + c_out U(c_in x,
log(sigma) / 4) is defined on states x0 + sigma noise. Our state is that state times 1 - t, with sigma = t / (1 - t),
and v = (x - D) / t, written here in a form without 0 / 0 at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.flow.types import broadcast_time

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def velocity_of(unet: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """v = [(t - sd^2 (1-t)) / A^2] x - (sd / A) U(x / A, log(sigma) / 4), with A^2 = t^2 + (1-t)^2 sd^2.

    x is (B, ...), t is (B,) in [0, 1]. sigma is clamped to [0.002, 80], the noise levels of the published models, so
    that the network's input is finite at both ends of the clock.
    """
    noise = noise_level(t)
    square = t**2 + ((1 - t) * sigma_data) ** 2
    size = square.sqrt()
    out = unet((x / broadcast_time(size, x)).to(x.dtype), noise)
    return broadcast_time((t - sigma_data**2 * (1 - t)) / square, x) * x - broadcast_time(sigma_data / size, x) * out


def noise_level(t: Tensor) -> Tensor:
    """log(sigma) / 4 of the times t, with sigma clamped to [0.002, 80]."""
    return torch.logit(t.clamp(SIGMA_MIN / (1 + SIGMA_MIN), SIGMA_MAX / (1 + SIGMA_MAX))) / 4


def one_hot(x: Tensor, cond, num_classes: int | None) -> Tensor | None:
    """One-hot classes (B, num_classes) in x's dtype, zeros for class -1 or no class. None without num_classes."""
    if not num_classes:
        return None
    label = cond["class"] if "class" in cond else torch.full((len(x),), -1, device=x.device)
    return F.one_hot(label + 1, num_classes + 1)[:, 1:].to(x.dtype)
