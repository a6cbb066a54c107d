"""LeDiFlow's losses: the likelihood's optimum and the KL in closed form, exact weights.

Also the evidence at the exact posterior.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.types import rows_of
from flowmap.objectives import OBJECTIVES, FlowMatching
from flowmap.objectives.lediflow import (
    WEIGHTS,
    ByVariance,
    InverseVariance,
    Unweighted,
    VarianceGuided,
    kl_of,
    negative_log_likelihood,
)
from tests.objectives.test_flow_matching import Nearly
from tests.support.oracle import GAUSSIAN, draw, draw_times


def parameter(value):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_the_likelihood_is_least_at_the_mean_and_the_mean_square_residual():
    x = 0.3 + 1.7 * draw(400, 3, seed=1)
    truth = x.mean(), (x - x.mean()).square().mean().log()

    def gradient(mean, logvar):
        given = parameter(float(mean)), parameter(float(logvar))
        value = negative_log_likelihood(x, given[0].expand_as(x), given[1].expand_as(x)).mean()
        return torch.stack(torch.autograd.grad(value, given))

    assert gradient(*truth).abs().max() < 1e-12
    for sign in (+1, -1):
        assert sign * gradient(truth[0] + 0.1 * sign, truth[1])[0] > 0.01
        assert sign * gradient(truth[0], truth[1] + 0.1 * sign)[1] > 0.01
    least = negative_log_likelihood(x, truth[0].expand_as(x), truth[1].expand_as(x)).mean()
    torch.testing.assert_close(least, (1 + truth[1]) / 2)  # the entropy of the fitted Gaussian, less ln(2 pi) / 2


def test_kl_is_that_of_the_two_normals():
    mean, logvar = draw(5, 4, seed=1), draw(5, 4, seed=2)
    normals = (
        torch.distributions.Normal(mean, (logvar / 2).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    torch.testing.assert_close(kl_of(mean, logvar), torch.distributions.kl_divergence(*normals))
    assert kl_of(torch.zeros(3), torch.zeros(3)).abs().max() == 0


class LinearGaussian(nn.Module):
    """x = a z + s eps, z ~ N(0, 1): the decoder and the exact posterior.

    Its mean and log-variance are shifted by `off`.
    """

    def __init__(self, a=0.8, s=0.5, off=(0.0, 0.0)):
        super().__init__()
        self.a, self.s, self.off = a, s, nn.ParameterList(parameter(one) for one in off)
        self.net = self

    def encode(self, x):
        total = self.a**2 + self.s**2
        return self.a * x / total + self.off[0], math.log(self.s**2 / total) + self.off[1].expand_as(x)

    def decode(self, z):
        return self.a * z, torch.full_like(z, 2 * math.log(self.s))


def drawn():
    """x0 (B, 1) with noise of mean 0 and mean square 1 exactly, all that the value depends on."""
    x0 = draw(6, 1, seed=3).repeat(2, 1)
    noise = torch.tensor([1.0, -1.0]).double().repeat_interleave(6).unsqueeze(1)
    t, s = draw_times(12)
    return replace(Linear().sample(x0, noise, t, s), xt=x0 * float("nan"))  # times and the point between play no part


def test_at_the_exact_posterior_the_value_is_minus_the_log_evidence_and_nowhere_less():
    sample = drawn()
    value = VarianceGuided()(LinearGaussian(), None, sample, 0).value
    evidence = torch.distributions.Normal(0.0, math.sqrt(0.8**2 + 0.5**2)).log_prob(sample.x0).mean()
    torch.testing.assert_close(value.detach(), -evidence - math.log(2 * math.pi) / 2)
    model = LinearGaussian()
    gradient = torch.autograd.grad(VarianceGuided()(model, None, sample, 0).value, list(model.off))
    assert all(one.abs() < 1e-12 for one in gradient)
    for sign in (+1, -1):
        for i, off in enumerate(((0.1 * sign, 0.0), (0.0, 0.1 * sign))):
            model = LinearGaussian(off=off)
            assert sign * torch.autograd.grad(VarianceGuided()(model, None, sample, 0).value, list(model.off))[i] > 0.01


def test_free_bits_cost_nothing_and_warm_up_starts_at_the_likelihood_alone():
    sample, model = drawn(), LinearGaussian()
    nats = float(kl_of(*model.encode(sample.x0)).mean(0).sum())
    likelihood = VarianceGuided(kl=0)(model, None, sample, 0).value
    for settings, step, expected in (
        ({}, 0, likelihood + nats),
        ({"kl": 0.5}, 0, likelihood + 0.5 * nats),
        ({"free_bits": 2 * nats}, 0, likelihood + 2 * nats),
        ({"warmup_steps": 10}, 0, likelihood),
        ({"warmup_steps": 10}, 4, likelihood + 0.4 * nats),
        ({"warmup_steps": 10}, 99, likelihood + nats),
    ):
        torch.testing.assert_close(VarianceGuided(**settings)(model, None, sample, step).value, expected)

    def gradient(**settings):
        model = LinearGaussian(off=(0.1, 0.1))
        return torch.stack(
            torch.autograd.grad(VarianceGuided(**settings)(model, None, sample, 0).value, list(model.off))
        )

    torch.testing.assert_close(gradient(free_bits=2 * nats), gradient(kl=0))
    assert not torch.allclose(gradient(), gradient(kl=0))


def test_kl_is_shared_over_the_entries_of_a_sample():
    """Copies of one entry: likelihood a mean, KL the same in all, so that kl weighs nats against nats."""

    class Wide(LinearGaussian):
        def encode(self, x):
            return super().encode(x[:, :1])

        def decode(self, z):
            mean, logvar = super().decode(z)
            return mean.expand(-1, 4), logvar.expand(-1, 4)

    sample = drawn()
    wide = replace(sample, x0=sample.x0.expand(-1, 4), x1=sample.x1.expand(-1, 4))
    likelihood = VarianceGuided(kl=0)(LinearGaussian(), None, sample, 0).value
    nats = VarianceGuided()(LinearGaussian(), None, sample, 0).value - likelihood
    torch.testing.assert_close(VarianceGuided()(Wide(), None, wide, 0).value, likelihood + nats / 4)


def test_the_nats_of_all_numbers_of_a_code_add_up():
    """Two numbers, of which the decoder reads one: the KL of both counts."""

    class Two(LinearGaussian):
        def encode(self, x):
            mean, logvar = super().encode(x[:, :1])
            return torch.cat([mean, 0 * mean + 0.7], 1), torch.cat([logvar, 0 * logvar], 1)

        def decode(self, z):
            mean, logvar = super().decode(z[:, :1])
            return mean.expand(-1, 2), logvar.expand(-1, 2)

    sample = drawn()
    wide = replace(sample, x0=sample.x0.expand(-1, 2), x1=sample.x1.expand(-1, 2))
    likelihood = VarianceGuided(kl=0)(Two(), None, wide, 0).value
    one = (
        VarianceGuided()(LinearGaussian(), None, sample, 0).value
        - VarianceGuided(kl=0)(LinearGaussian(), None, sample, 0).value
    )
    torch.testing.assert_close(VarianceGuided()(Two(), None, wide, 0).value, likelihood + (one + 0.7**2 / 2) / 2)


VARIANCE = draw(seed=5).exp()


@pytest.mark.parametrize("weight", [InverseVariance(), InverseVariance(floor=0.0), ByVariance(floor=0.3)])
def test_weights_are_normalised_exactly_and_are_powers_of_the_variance(weight):
    found = weight(VARIANCE)
    torch.testing.assert_close(found.flatten(1).mean(1), torch.ones(5).double(), rtol=0, atol=1e-14)
    rule = (VARIANCE + weight.floor) ** weight.power
    torch.testing.assert_close(found / rule, (found / rule)[:, :1, :1, :1].expand_as(found))
    whole = replace(weight, over="batch")(VARIANCE)
    torch.testing.assert_close(whole.mean(), torch.ones(()).double(), rtol=0, atol=1e-14)
    assert (whole.flatten(1).mean(1) - 1).abs().max() > 0.01
    torch.testing.assert_close(weight(torch.full_like(VARIANCE, 0.7)), torch.ones_like(VARIANCE))


def test_inverse_variance_counts_what_is_sure_most():
    variance = torch.tensor([[0.1, 1.0, 10.0]]).double()
    assert InverseVariance()(variance).argmax() == 0 and ByVariance()(variance).argmax() == 2
    torch.testing.assert_close(InverseVariance(floor=0.0)(variance), torch.tensor([[10, 1, 0.1]]).double() * 3 / 11.1)
    assert WEIGHTS["inverse_variance"] is InverseVariance and WEIGHTS["variance"] is ByVariance
    for settings, says in (({"floor": -1.0}, "floor"), ({"over": "all"}, "over")):
        with pytest.raises(ValueError, match=says):
            InverseVariance(**settings)


def test_a_weighted_flow_matching_loss_is_the_weighted_mean_square():
    x0, x1, (t, s) = draw(seed=1), draw(seed=2), draw_times()
    sample = replace(Linear().sample(x0, x1, t, s), variance=VARIANCE)
    student = Nearly(GAUSSIAN, scale=1.3)
    error = (1.3 * GAUSSIAN.velocity(sample.xt, sample.t) - (x1 - x0)).square()
    weight = InverseVariance()
    loss = FlowMatching(weight=weight)(student, None, sample, 0)
    torch.testing.assert_close(loss.value.detach(), (weight(VARIANCE) * error).mean())
    plain = FlowMatching()(student, None, sample, 0).value
    assert torch.equal(plain, FlowMatching(weight=weight)(student, None, replace(sample, variance=None), 0).value)
    assert torch.equal(plain, FlowMatching(weight=Unweighted())(student, None, sample, 0).value)
    some = rows_of(sample, torch.tensor([3, 1]))
    torch.testing.assert_close(
        FlowMatching(weight=weight)(student, None, some, 0).logs["error"], loss.logs["error"][[3, 1]]
    )


@pytest.mark.parametrize("weight", [InverseVariance(), ByVariance()])
def test_weights_do_not_move_the_minimum(weight):
    x0, x1, (t, s) = draw(seed=1), draw(seed=2), draw_times()
    sample = replace(Linear().sample(x0, x1, t, s), variance=VARIANCE)
    for scale, check in ((1.0, lambda g: abs(g) < 1e-12), (1.02, lambda g: g > 1e-3), (0.98, lambda g: g < -1e-3)):
        student = Nearly(GAUSSIAN, scale=scale)
        assert check(
            torch.autograd.grad(FlowMatching(weight=weight)(student, GAUSSIAN, sample, 0).value, student.scale)[0]
        )


@pytest.mark.parametrize("settings", [{"kl": -1.0}, {"free_bits": -0.1}, {"warmup_steps": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        VarianceGuided(**settings)
    assert OBJECTIVES["variance_guided"] is VarianceGuided
