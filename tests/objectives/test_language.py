"""The evidence lower bound of a text autoencoder: closed forms, free bits, annealing, and that it descends."""

from dataclasses import replace

import pytest
import torch

from flowmap.flow.types import PathSample
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.text_vae import TextVAE
from flowmap.objectives.language import TextELBO, divergence, named_by_noise

SPECIAL = (0, 1, 2, 3)


def student(seed=0):
    torch.manual_seed(seed)
    return FlowMapNet(TextVAE(slots=2, dims=3, width=16, depth=1, heads=2, vocab=11, special=SPECIAL).build((7,)))


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, 11, (5, 7), generator=generator)
    for row, length in zip(rows, (6, 3, 5, 1, 4), strict=True):
        row[length], row[length + 1 :] = 2, 0
    zeros = torch.zeros(5)
    return PathSample(rows.float(), torch.randn(5, 7, generator=generator), zeros, zeros, rows.float(), rows.float())


def test_a_sentences_draws_are_functions_of_its_own_noise():
    """They were seeded by the whole batch's sum."""
    x1 = sample().x1
    whole, part = named_by_noise("elbo", x1), named_by_noise("elbo", x1[[3, 1]])
    assert len(whole.rows.unique()) == 5 and torch.equal(whole.normal((6,))[[3, 1]], part.normal((6,)))


def test_the_divergence_is_that_of_two_gaussians():
    mean, logvar = torch.randn(5, 3, 1, 2, dtype=torch.float64), torch.randn(5, 3, 1, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))
    )
    kl, bounded = divergence(mean, logvar, 0.0)
    torch.testing.assert_close(kl.double(), exact.flatten(1).sum(1).mean(), rtol=1e-6, atol=1e-6)
    assert kl == bounded


def test_free_bits_are_free():
    """An entry with a mean divergence below the bound gives no gradient; one above does.  The bound is counted."""
    mean = torch.tensor([[0.1, 2.0], [-0.1, -2.0]], requires_grad=True)
    kl, bounded = divergence(mean, torch.zeros(2, 2), 0.5)
    bounded.backward()
    assert torch.equal(mean.grad[:, 0], torch.zeros(2)) and (mean.grad[:, 1] != 0).all()
    assert float(bounded.detach()) == pytest.approx(0.5 + 2.0) and float(kl.detach()) == pytest.approx(0.005 + 2.0)


def test_annealing_by_step():
    objective = TextELBO(kl=0.8, anneal_steps=10)
    assert [objective.beta(step) for step in (0, 5, 10, 1000)] == [0, 0.4, 0.8, 0.8]
    assert TextELBO(kl=0.8, anneal_steps=0).beta(0) == 0.8


def test_its_value_is_the_bound_by_hand():
    one, net = sample(), student()
    mean, logvar = net.net.moments(one.x0)
    loss = TextELBO(kl=1.0, free_bits=0.0, anneal_steps=0)(net, None, one, 0)
    tokens = (6 + 3 + 5 + 1 + 4 + 5) / 5
    kl, _ = divergence(mean, logvar, 0.0)
    torch.testing.assert_close(loss.value, loss.logs["nll_per_token"] + kl.detach() / tokens, rtol=1e-5, atol=1e-5)


def test_it_is_a_function_of_the_sample_and_nothing_else():
    one, net, objective = sample(), student(), TextELBO(word_dropout=0.5)
    first = objective(net, None, one, 3).value
    torch.manual_seed(99)
    assert torch.equal(objective(net, None, one, 3).value, first)
    other = PathSample(one.x0, one.x1 + 1, one.t, one.s, one.xt, one.vt)
    assert not torch.equal(objective(net, None, other, 3).value, first)


def test_padding_is_not_looked_at():
    """What stands after the end token changes neither posterior nor loss."""
    one, net = sample(), student()
    rows = one.x0.clone()
    rows[3, 3:] = 9
    objective, other = TextELBO(), PathSample(rows, one.x1, one.t, one.s, one.xt, one.vt)
    torch.testing.assert_close(objective(net, None, one, 3).value, objective(net, None, other, 3).value)


def test_it_descends_and_greedy_decoding_gives_the_sentences_back():
    one, net = sample(), student()
    objective, optimiser = TextELBO(kl=1e-3, free_bits=0.0, anneal_steps=0), torch.optim.Adam(net.parameters(), 1e-2)
    first = float(objective(net, None, one, 0).value.detach())
    for step in range(150):
        optimiser.zero_grad()
        loss = objective(net, None, replace(one, x1=one.x1 + step), step).value  # other noise
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.2 * first
    rows = net.net.generate(net.net.moments(one.x0)[0])
    assert torch.equal(rows, one.x0.long())


@pytest.mark.parametrize("change", [{"kl": -1.0}, {"free_bits": -0.1}, {"anneal_steps": -1}, {"word_dropout": 1.5}])
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
        TextELBO(**change)
