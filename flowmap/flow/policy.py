"""Policies: several predictions of the data between two times, and the flow that they make without a network.

Source: the DX policy of pi-Flow, Chen et al. 2025, arXiv:2510.14974. A network, called once at (x, t) for the interval
[s, t], gives K velocities u_k. Each stands for the data x0_k = x - t u_k at the time tau_k, evenly spaced from s to t;
between these times the data x0(tau) is linear in tau, and the policy is the velocity

    pi(y, tau) = (y - x0(tau)) / tau

The paper integrates it by many small Euler steps. The equation is linear, so here its solution is used, with phi_k the
hat functions of the grid of times:

    y(tau) = x - t sum_k w_k(tau) u_k,   w_k(tau) = tau int_tau^t phi_k(r) / r^2 dr,   sum_k w_k = 1 - tau / t
    F(x, t, s) = (x - y(s)) / (t - s) = t / (t - s) sum_k w_k(s) u_k

F is a mean of the u_k. It is u where all of them are u. At s = t it is their mean by the trapezoidal rule, the limit.
All weights are functions of the ratios tau / t and s / t, and are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmap.flow.types import broadcast_time

SHORTEST = 1e-6  # of an interval relative to t: shorter ones have its weights
TINY = 1e-12


def ratio(s: Tensor, t: Tensor) -> Tensor:
    """s / t in float64, kept off 0 and 1 by what does not matter; 1 at s = t = 0."""
    s, t = s.double(), t.double()
    return torch.where(t > 0, s / t.clamp_min(TINY), torch.ones_like(t)).clamp(TINY, 1 - SHORTEST)


def hats(at: Tensor, r: Tensor, num_points: int) -> Tensor:
    """phi_k (B, K) at tau / t = at, for s / t = r, both (B,): the linear interpolation between the K times."""
    place = ((at - r) / (1 - r)).clamp(0, 1) * (num_points - 1)
    return (1 - (place[:, None] - torch.arange(num_points, device=at.device)).abs()).clamp_min(0)


def weights(at: Tensor, r: Tensor, num_points: int) -> Tensor:
    """w_k (B, K) at tau / t = at, for s / t = r, both (B,) in float64 and r as of `ratio`."""
    at = torch.maximum(at, r)
    steps = torch.arange(num_points, device=r.device) / (num_points - 1)
    times = r[:, None] + (1 - r)[:, None] * steps
    first, last = times[:, :-1], times[:, 1:]
    start = torch.minimum(torch.maximum(first, at[:, None]), last)  # of what is left of each interval
    x = (last - start) / start
    falling = _less_its_log(x)
    rising = x.square() / (1 + x) - falling + (start - first) / start * x / (1 + x)
    factor = (at / (1 - r) * (num_points - 1))[:, None]
    none = torch.zeros_like(factor)
    return torch.cat([factor * falling, none], 1) + torch.cat([none, factor * rising], 1)


def _less_its_log(x: Tensor) -> Tensor:
    """x - log(1 + x) for x >= 0, without cancellation at small x."""
    small = x.clamp_max(0.01)
    series = sum((-1) ** n * small**n / n for n in range(2, 9))
    return torch.where(x < 0.01, series, x - torch.log1p(x))


def mixed(weight: Tensor, u: Tensor) -> Tensor:
    """sum_k weight_k u_k, (B, ...), of weights (B, K) and velocities (B, K, ...), in the dtype of u."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return (weight.to(wide).reshape(*weight.shape, *[1] * (u.ndim - 2)) * u).sum(1).to(u.dtype)


def mean_velocity(u: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """F(x, t, s) of the policy of velocities u (B, K, ...), shaped like x; t and s are (B,)."""
    r = ratio(s, t)
    return mixed(weights(r, r, u.shape[1]) / (1 - r)[:, None], u)


def state(x: Tensor, u: Tensor, t: Tensor, s: Tensor, at: Tensor) -> Tensor:
    """y(tau), shaped like x, where the policy leads from (x, t); at = tau / t (B,) in float64."""
    moved = mixed(weights(at, ratio(s, t), u.shape[1]), u)
    return (x - broadcast_time(t, x) * moved).to(x.dtype)
