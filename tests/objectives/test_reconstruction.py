"""The autoencoder's loss against its terms by hand, and that its gradient is what differences say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.objectives import Reconstruction


class Scaled(nn.Module):
    """A linear autoencoder: z = a x without its last column, decoded by padding with zero."""

    def __init__(self, a: float, logvar: float):
        super().__init__()
        self.a, self.logvar = nn.Parameter(torch.tensor(a, dtype=torch.float64)), logvar

    def moments(self, x):
        mean = self.a * x[..., :-1]
        return mean, torch.full_like(mean, self.logvar)

    def decode(self, z):
        return nn.functional.pad(z, (0, 1))


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def drawn():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(5, 3, 4, 6, generator=generator).double() for _ in range(2))
    t = torch.linspace(0.1, 0.9, 5).double()
    return Linear().sample(x0, x1, t, t)


def test_the_value_is_the_sum_of_its_terms():
    sample, logvar = drawn(), -1.3
    loss = Reconstruction(squared=0.7, kl=0.01)(Holder(Scaled(0.8, logvar)), None, sample, 0)
    mean = 0.8 * sample.x0[..., :-1]
    noise = sample.x1.flatten(1)[:, : 3 * 4 * 5].view(5, 3, 4, 5)
    error = nn.functional.pad(mean + torch.tensor(logvar / 2, dtype=torch.float64).exp() * noise, (0, 1)) - sample.x0
    normal = torch.distributions.Normal(mean, torch.tensor(logvar / 2, dtype=torch.float64).exp())
    kl = torch.distributions.kl_divergence(
        normal, torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    ).mean()
    torch.testing.assert_close(loss.value, error.abs().mean() + 0.7 * error.square().mean() + 0.01 * kl)
    assert {"absolute", "squared", "kl"} == set(loss.logs)


def test_its_gradient_is_the_central_difference():
    def value(a):
        net = Holder(Scaled(a, -1.0))
        return Reconstruction(kl=0.5)(net, None, drawn(), 0).value, net

    loss, net = value(0.8)
    loss.backward()
    difference = (value(0.8 + 1e-6)[0] - value(0.8 - 1e-6)[0]) / 2e-6
    torch.testing.assert_close(net.net.a.grad, difference.detach(), rtol=1e-6, atol=1e-6)


def test_latents_larger_than_pictures_are_refused():
    class Large(Scaled):
        def moments(self, x):
            return x.repeat(1, 2, 1, 1), x.repeat(1, 2, 1, 1)

    with pytest.raises(ValueError, match="latent_channels"):
        Reconstruction()(Holder(Large(1.0, 0.0)), None, drawn(), 0)
