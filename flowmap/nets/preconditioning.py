"""EDM's preconditioning said on our clock: how a network trained as an EDM or EDM2 denoiser gives a velocity.

Source: Karras et al. 2022, arXiv:2206.00364, table 1. The denoiser D(x, sigma) = c_skip x + c_out U(c_in x, log(sigma) / 4) knows the state
x0 + sigma noise; ours is that state times 1 - t, with sigma = t / (1 - t), and v = (x - D) / t, written here without its 0 / 0 at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.flow.types import broadcast_time

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def velocity_of(unet: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """v = [(t - sd^2 (1-t)) / A^2] x - (sd / A) U(x / A, log(sigma) / 4), A^2 = t^2 + (1-t)^2 sd^2; x (B, ...), t (B,) in [0, 1].

    sigma is held between 0.002 and 80, the noise levels that the published models know, so both ends of the clock are finite.
    """
    held = t.clamp(SIGMA_MIN / (1 + SIGMA_MIN), SIGMA_MAX / (1 + SIGMA_MAX))
    noise = torch.logit(held) / 4  # log(sigma) / 4
    square = t**2 + ((1 - t) * sigma_data) ** 2
    size = square.sqrt()
    out = unet((x / broadcast_time(size, x)).to(x.dtype), noise)
    return broadcast_time((t - sigma_data**2 * (1 - t)) / square, x) * x - broadcast_time(sigma_data / size, x) * out


def one_hot(x: Tensor, cond, num_classes: int | None) -> Tensor | None:
    """The classes of cond as rows (B, num_classes) of x's dtype; a class of -1, or none given, is a row of zeros. None without classes."""
    if not num_classes:
        return None
    label = cond["class"] if "class" in cond else torch.full((len(x),), -1, device=x.device)
    return F.one_hot(label + 1, num_classes + 1)[:, 1:].to(x.dtype)
