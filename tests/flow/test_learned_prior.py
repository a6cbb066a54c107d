"""Learned priors: start points are functions of seeds, N(0, I) is a special case, and the exact flow is correct."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.flow.codes import FlowDraws, MixtureDraws, NormalDraws
from flowmap.flow.path import Linear
from flowmap.flow.prior import PRIORS, Gaussian, Learned, LearnedPrior, for_codes, placed, start_of, starts
from flowmap.flow.solver import RK4
from flowmap.nets.auxiliary import ConvPrior
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.objectives import FlowMatching
from flowmap.recipe import read_recipe
from flowmap.train.draw import draw_sample
from tests.support.oracle import draw, seeded

SHAPE = (3, 4, 6)


class Affine(nn.Module):
    """z = the first two entries of x0, exactly; x1 | z ~ N(a z_1 + b z_2, exp(logvar))."""

    def __init__(self, a=0.0, b=0.0, logvar=0.0, shape=SHAPE):
        super().__init__()
        self.a, self.b, self.shape = a, b, shape
        self.logvar = nn.Parameter(torch.tensor(float(logvar)))

    def encode(self, x):
        mean = x.flatten(1)[:, :2]
        return mean, torch.full_like(mean, -1.0)

    def decode(self, z):
        level = (self.a * z[:, 0] + self.b * z[:, 1]).view(-1, *[1] * len(self.shape))
        ones = torch.ones(len(z), *self.shape, dtype=z.dtype, device=z.device)
        return level * ones, self.logvar.to(z.dtype) * ones


def prior_of(*args, scale=1.0, conditioning=True, codes=None, **settings):
    return LearnedPrior(Affine(*args, **settings), codes or NormalDraws(), 2, scale=scale, conditioning=conditioning)


def test_a_prior_of_mean_0_variance_1_and_scale_1_trains_bit_for_bit_as_the_gaussian_one():
    recipe = read_recipe("lediflow/digits-gaussian")
    guided = read_recipe("digits")
    x0 = draw(7, 1, 8, 8, dtype=torch.float32)
    for conditioning in (True, False):
        prior = prior_of(conditioning=conditioning, shape=(1, 8, 8))
        for one, cond in ((recipe, {}), (guided, {"class": torch.arange(7)})):
            plain, learned = (draw_sample(one, x0, cond, seeded(3), prior=given) for given in (None, prior))
            for name in ("x0", "x1", "t", "s", "xt", "vt"):
                assert torch.equal(getattr(plain, name), getattr(learned, name)), name
            rest = {key: value for key, value in (learned.cond or {}).items() if key != "z"}
            assert rest.keys() == (plain.cond or {}).keys() and all(
                torch.equal(rest[key], plain.cond[key]) for key in rest
            )
            assert ("z" in (learned.cond or {})) == conditioning
        assert torch.equal(learned.variance, torch.ones_like(x0)) and plain.variance is None
    gaussian = starts(None, (1, 8, 8), 7, seeded(5))
    assert torch.equal(gaussian.x1, starts(prior, (1, 8, 8), 7, seeded(5)).x1) and gaussian.conditioning == {}
    assert torch.equal(gaussian.x1, torch.randn(7, 1, 8, 8, generator=seeded(5)))


def test_the_second_stream_leaves_the_first_alone():
    one, other = seeded(4), seeded(4)
    torch.randn(5, generator=for_codes(one))
    assert torch.equal(torch.randn(5, generator=one), torch.randn(5, generator=other))
    assert not torch.equal(torch.randn(5, generator=for_codes(one)), torch.randn(5, generator=seeded(4)))
    assert for_codes(None) is None


def test_starts_are_the_decoders_mean_and_scaled_deviation():
    prior = prior_of(0.5, -0.25, -1.0, scale=0.7)
    z, eps = draw(5, 2, dtype=torch.float32), draw(5, *SHAPE, seed=1, dtype=torch.float32)
    start = prior.place(z, eps)
    level = (0.5 * z[:, 0] - 0.25 * z[:, 1]).view(5, 1, 1, 1)
    variance = 0.7**2 * torch.tensor(-1.0).exp()
    torch.testing.assert_close(start.x1, level + variance.sqrt() * eps)
    torch.testing.assert_close(start.variance, variance.expand(5, *SHAPE))
    assert torch.equal(start.conditioning["z"], z)
    x0 = draw(5, *SHAPE, dtype=torch.float32)
    assert torch.equal(
        prior.sample(x0, None, seeded(2)), prior.start(x0, {"z": prior.encode(x0, for_codes(seeded(2)))}, seeded(2)).x1
    )
    assert torch.equal(prior.encode(x0), x0.flatten(1)[:, :2])


def test_codes_of_training_are_draws_of_the_posterior():
    prior, x0 = prior_of(), torch.zeros(20_000, 2)
    z = prior.encode(x0, seeded(1))
    assert z.mean(0).abs().max() < 5 * (torch.tensor(-1.0).exp() / 20_000).sqrt()
    torch.testing.assert_close(z.var(), torch.tensor(-1.0).exp(), rtol=0.05, atol=0)  # five standard errors


def test_the_exact_form_does_not_depend_on_how_many_are_computed_at_once():
    torch.manual_seed(0)
    net = ConvPrior(size=4, channels=(8, 16), groups=4).build((2, 8, 8)).eval()
    codes = FlowDraws(FlowMapNet(MLP(width=16, depth=2).build((4,), arrival=False)), RK4(steps=2))
    exact = LearnedPrior(net, codes, 4).exact()
    noise, coarse = torch.randn(33, 2, 8, 8), torch.randn(33, 5)
    whole = placed(exact, noise, coarse)
    for size in (1, 7, 32):
        parts = placed(exact, noise, coarse, batch_size=size)
        assert torch.equal(parts.x1, whole.x1) and torch.equal(parts.conditioning["z"], whole.conditioning["z"])
    assert next(net.parameters()).dtype == torch.float32


def test_a_mixture_has_the_shares_means_and_covariances_of_its_parts():
    weights, means = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([[-5.0, 0], [0, 5], [5, 0]]).double()
    factors = torch.tensor([[[1.0, 0], [0.5, 0.2]], [[0.3, 0], [0, 0.3]], [[0.5, 0], [-0.4, 0.1]]]).double()
    codes = MixtureDraws(weights, means, factors)
    noise = torch.randn(40_000, 3, generator=seeded(1))
    z, part = codes(noise).double(), None
    part = torch.cdist(z, means).argmin(1)
    for k in range(3):
        mine = z[part == k]
        assert abs(len(mine) / 40_000 - weights[k]) < 5 * (0.25 / 40_000) ** 0.5
        assert (mine.mean(0) - means[k]).abs().max() < 0.06
        torch.testing.assert_close(mine.T.cov(), factors[k] @ factors[k].T, rtol=0, atol=0.06)
    assert torch.equal(codes(noise[[7, 3]]), codes(noise)[[7, 3]])


def exact_velocity(x, t, z):
    """The velocity of data N(2 z_1, 0.3^2) and a prior N(z_1 - z_2, 0.5^2), given z: linear in x."""
    m, mu, c, s = 2 * z[:, :1], z[:, :1] - z[:, 1:], 0.3, 0.5
    t = t.unsqueeze(1)
    spread = (1 - t) ** 2 * c**2 + t**2 * s**2
    return mu - m + (t * s**2 - (1 - t) * c**2) / spread * (x - (1 - t) * m - t * mu)


class Told(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale).double())

    def mean_velocity(self, x, t, s, cond=None):
        return self.scale * exact_velocity(x, t, cond["z"])


def test_the_exact_flow_from_a_learned_gaussian_prior_arrives_at_the_data():
    prior = prior_of(1.0, -1.0, 2 * torch.tensor(0.5).log(), shape=(3,))
    z, eps = draw(9, 2, seed=1), draw(9, 3, seed=2)
    x1 = prior.place(z, eps).x1
    x0 = RK4(steps=60)(lambda x, t: exact_velocity(x, t, z), x1).x
    torch.testing.assert_close(x0, 2 * z[:, :1] + 0.3 * eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale, sign", [(1.0, 0), (1.1, 1), (0.9, -1)])
def test_flow_matching_from_a_learned_prior_has_its_minimum_at_that_flow(scale, sign):
    n = 40_000
    prior = prior_of(1.0, -1.0, 2 * torch.tensor(0.5).log(), shape=(3,))
    z = draw(n, 2, seed=1)
    x0, eps = 2 * z[:, :1] + 0.3 * draw(n, 3, seed=3), draw(n, 3, seed=2)
    start = prior.place(z, eps)
    t = torch.linspace(0, 1, n).double()
    sample = replace(Linear().sample(x0, start.x1, t, t, start.conditioning), variance=start.variance)
    student = Told(scale)
    gradient = torch.autograd.grad(FlowMatching()(student, None, sample, 0).value, student.scale)[0]
    assert abs(gradient) < 0.05 if sign == 0 else sign * gradient > 0.1  # five standard errors are 0.03


def test_priors_of_a_user_with_nothing_but_sample_still_work():
    class Wide:
        def sample(self, x0, cond=None, generator=None):
            return 3 * Gaussian().sample(x0, cond, generator)

    start = start_of(Wide(), torch.zeros(5, 3), None, seeded(1))
    assert torch.equal(start.x1, 3 * Gaussian().sample(torch.zeros(5, 3), None, seeded(1))) and start.variance is None
    assert PRIORS["learned"] is Learned
