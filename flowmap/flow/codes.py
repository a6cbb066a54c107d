"""Code samplers: map standard normal noise (B, Z + 1) to codes (B, Z), each a function of its row of noise only.

The last column of the noise serves samplers that choose between alternatives.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NormalDraws:
    """z = the noise itself."""

    def __call__(self, noise: Tensor) -> Tensor:
        return noise[:, :-1]

    def to(self, device) -> NormalDraws:
        return self

    def double(self) -> NormalDraws:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}


class MixtureDraws:
    """z = mean_k + L_k eps; the normal distribution function of the last column selects the component k.

    weights (K,), means (K, Z), factors (K, Z, Z) with covariance L L^T, all float64.
    """

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor):
        self.weights, self.means, self.factors = weights, means, factors

    def __call__(self, noise: Tensor) -> Tensor:
        share = torch.special.ndtr(noise[:, -1].double())
        edges = self.weights.cumsum(0) / self.weights.sum()
        k = torch.searchsorted(edges, share).clamp(max=len(edges) - 1)
        z = self.means[k] + torch.einsum("bij,bj->bi", self.factors[k], noise[:, :-1].double())
        return z.to(noise.dtype)

    def to(self, device) -> MixtureDraws:
        self.weights, self.means, self.factors = (part.to(device) for part in (self.weights, self.means, self.factors))
        return self

    def double(self) -> MixtureDraws:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "means": self.means, "factors": self.factors}


class FlowDraws:
    """z = the solution of the probability flow of a network, with velocity F(z, t, t), from the noise."""

    def __init__(self, flow_map, solver):
        self.flow_map, self.solver = flow_map.eval().requires_grad_(False), solver

    def __call__(self, noise: Tensor) -> Tensor:
        return self.solver(lambda z, t: self.flow_map.mean_velocity(z, t, t, None), noise[:, :-1]).x

    def to(self, device) -> FlowDraws:
        self.flow_map.to(device)
        return self

    def double(self) -> FlowDraws:
        self.flow_map.double()
        return self

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.flow_map.state_dict())
