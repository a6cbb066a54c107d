"""The dual forward through unmodified diffusers networks with default attention: tiny random ones, float64.

Twin: torch.func.jvp with attention in elementary operations, where that runs; where it does not (torch's group norm),
central differences.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowmap.flow.derivative import value_and_rate
from tests.support import tiny_nets

B = 2
TEXT = torch.linspace(-1, 1, B * 5 * 32).view(B, 5, 32).double() * 0.3
POOLED = torch.linspace(-1, 1, B * 24).view(B, 24).double() * 0.3


def dit():
    net = tiny_nets.dit()
    return net, lambda x, t: net(x, timestep=t, class_labels=torch.tensor([1, 2])).sample, torch.randn(B, 4, 8, 8), 10


def sd3():
    net = tiny_nets.sd3()
    call = lambda x, t: net(hidden_states=x, timestep=t, encoder_hidden_states=TEXT, pooled_projections=POOLED).sample
    return net, call, torch.randn(B, 4, 8, 8), 10


def flux():
    net = tiny_nets.flux()
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    call = lambda x, t: (
        net(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=TEXT,
            pooled_projections=POOLED,
            img_ids=places,
            txt_ids=torch.zeros(5, 3),
        ).sample
    )
    return net, call, torch.randn(B, 16, 16), 0.01


def pixart():
    net, added = tiny_nets.pixart(), {"resolution": None, "aspect_ratio": None}
    return (
        net,
        lambda x, t: net(x, encoder_hidden_states=TEXT, timestep=t, added_cond_kwargs=added).sample,
        torch.randn(B, 4, 8, 8),
        10,
    )


def sana():
    net = tiny_nets.sana()
    return net, lambda x, t: net(x, encoder_hidden_states=TEXT, timestep=t).sample, torch.randn(B, 4, 8, 8), 10


def sd():
    net = tiny_nets.sd()
    return net, lambda x, t: net(x, t, TEXT).sample, torch.randn(B, 4, 8, 8), 10


def unet():
    net = tiny_nets.unet()
    return net, lambda x, t: net(x, t).sample, torch.randn(B, 3, 16, 16), 10


def decoder():
    net = tiny_nets.kl()
    return net, lambda x, t: net.decode(x).sample * (1 + t.view(-1, 1, 1, 1)), torch.randn(B, 4, 8, 8), 1


def made(make):
    torch.manual_seed(0)
    net, call, x, scale = make()
    tiny_nets.with_random_weights(net).double().eval()  # eval: in train mode DiT drops labels at random
    return net, call, x.double(), torch.tensor([0.37, 0.81]).double() * scale, torch.randn(x.shape).double()


@pytest.mark.parametrize("make", [dit, flux, sd3, pixart, sana, sd])
def test_the_dual_forward_is_torchs_forward_mode(make, monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # Sana's attention is written in float32: without this, 7e-10
    net, call, x, t, v = made(make)
    tangents = (v, torch.ones_like(t))
    value, rate = value_and_rate(call, (x, t), tangents)
    ordinary, reference = value_and_rate(call, (x, t), tangents, mode="forward")
    assert torch.equal(value, ordinary)
    assert (rate - reference).norm() < 1e-10 * reference.norm()
    value.sum().backward()
    dual = [p.grad for p in net.parameters()]
    net.zero_grad()
    ordinary.sum().backward()
    assert all(
        (a is None) == (p.grad is None) and (a is None or torch.equal(a, p.grad))
        for a, p in zip(dual, net.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [unet, decoder])
def test_the_dual_forward_is_the_central_difference_where_forward_mode_fails(make):
    _, call, x, t, v = made(make)
    ones = torch.ones_like(t)
    with torch.no_grad():
        # diffusers embeds time in float32, so the difference in t is accurate to eps / h = 1e-4; that in x is float64
        in_x, h = value_and_rate(call, (x, t), (v, None))[1], 1e-5
        difference = (call(x + h * v, t) - call(x - h * v, t)) / (2 * h)
        assert (in_x - difference).norm() < 1e-7 * difference.norm()
        in_t, h = value_and_rate(call, (x, t), (None, ones))[1], 1e-2
        difference = (call(x, t + h) - call(x, t - h)) / (2 * h)
        assert (in_t - difference).norm() < 1e-3 * difference.norm()
        both = value_and_rate(call, (x, t), (v, ones))[1]
    torch.testing.assert_close(both, in_x + in_t, rtol=1e-10, atol=1e-10)
