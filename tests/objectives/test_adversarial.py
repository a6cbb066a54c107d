"""Adversarial finetuning in closed form: losses and penalties by hand, their gradients by finite differences.

Also balanced factors, and two Gaussians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from flowmap.nets.discriminator import Conv
from flowmap.objectives import AYFEMD, FlowMatching, Reconstruction
from flowmap.objectives.adversarial import (
    Adversarial,
    discriminator_loss,
    generator_loss,
    pairing_loss,
    squared_gradient,
)
from flowmap.objectives.drawing import generate
from flowmap.samplers import Deterministic, Gamma
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, draw_times, seeded

LINEAR = draw(*SHAPE[1:], seed=9)


def linear(x, cond=None, noise=None):
    """D(x) = <w, x>: its gradient is w everywhere."""
    return (x * LINEAR).flatten(1).sum(1)


def quadratic(x, cond=None, noise=None):
    """D(x) = |x|^2 / 2: its gradient is x."""
    return x.flatten(1).square().sum(1) / 2


def test_the_pairing_loss_is_the_relativistic_one():
    high, low = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 3.0, -30.0])
    wanted = torch.tensor([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(5.0)), 0.0])
    torch.testing.assert_close(pairing_loss(high, low), wanted)


def test_the_discriminators_loss_by_hand():
    real, fake = draw(seed=1), draw(seed=2)
    r1, r2 = 0.3, 0.7
    loss = discriminator_loss(quadratic, real, fake, r1=r1, r2=r2)
    score = lambda x: x.flatten(1).square().sum(1) / 2
    pairing = torch.log1p((score(fake) - score(real)).exp()).mean()
    penalties = r1 / 2 * real.flatten(1).square().sum(1).mean() + r2 / 2 * fake.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(loss.value, pairing + penalties)
    torch.testing.assert_close(loss.logs["r1"], real.flatten(1).square().sum(1).mean())
    torch.testing.assert_close(loss.logs["discriminator_loss"], pairing)
    torch.testing.assert_close(loss.logs["score_gap"], (score(real) - score(fake)).mean())
    assert "r1" not in discriminator_loss(linear, real, fake, r1=0.0, r2=0.0).logs
    flat = discriminator_loss(linear, real, fake, r1=1.0, r2=1.0)
    torch.testing.assert_close(flat.value - flat.logs["discriminator_loss"], LINEAR.square().sum())


def test_the_discriminators_loss_leaves_the_student_alone():
    for r in (0.0, 1.0):
        fake, weight = draw(seed=2).requires_grad_(), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        discriminator_loss(
            lambda x, cond, noise, weight=weight: weight * quadratic(x), draw(seed=1), fake, r1=r, r2=r
        ).value.backward()
        assert fake.grad is None and weight.grad is not None


def test_the_students_loss_is_the_pairing_turned_round():
    real, fake = draw(seed=1), draw(seed=2).requires_grad_()
    value = generator_loss(linear, real, fake)
    gap = linear(real) - linear(fake)
    torch.testing.assert_close(value, torch.log1p(gap.exp()).mean())
    value.backward()  # the student is pushed up the score: d/dfake softplus(D(real) - D(fake)) = -sigmoid(gap) w
    torch.testing.assert_close(fake.grad, -torch.sigmoid(gap.detach())[:, None, None, None] * LINEAR / SHAPE[0])


def test_rows_of_a_pair_share_condition_and_noise():
    seen = []

    def scores(x, cond, noise):
        seen.append((cond["class"], noise))
        return linear(x)

    noise, label = draw(seed=3), torch.arange(5)
    discriminator_loss(scores, draw(seed=1), draw(seed=2), {"class": label}, noise, r1=0.0, r2=0.0)
    assert torch.equal(seen[0][0], torch.cat([label, label])) and torch.equal(seen[0][1], torch.cat([noise, noise]))


def test_the_penalty_is_the_squared_gradient_and_its_gradient_that_of_differences():
    """Both against central differences in float64: error of order h^2 = 1e-10, divided by nothing smaller than 1."""
    torch.manual_seed(0)
    net = Conv(width=4, depth=1).build(SHAPE[1:], num_classes=3).double()
    x, cond, h = draw(seed=1), {"class": torch.tensor([0, 1, 2, -1, 0])}, 1e-5
    at = x.clone().requires_grad_()
    penalty = squared_gradient(net(at, cond), at)
    slopes = torch.zeros(5, x[0].numel(), dtype=torch.float64)
    for i in range(x[0].numel()):
        step = torch.zeros_like(x).flatten(1)
        step[:, i] = h
        step = step.view_as(x)
        slopes[:, i] = ((net(x + step, cond) - net(x - step, cond)) / (2 * h)).detach()
    torch.testing.assert_close(penalty.detach(), slopes.square().sum(1), rtol=1e-6, atol=1e-9)
    loss = lambda: discriminator_loss(net, x, x.flip(0) / 2, cond, r1=2.0, r2=0.5).value
    loss().backward()
    for parameter in (net.enter.weight, net.blocks[1].second.weight, net.mix.weight, net.score.label.weight):
        gradient, place = parameter.grad.flatten()[1], parameter.data.flatten()
        place[1] += h
        above = loss().detach()
        place[1] -= 2 * h
        below = loss().detach()
        place[1] += h
        torch.testing.assert_close(gradient, (above - below) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_the_factors_balance_the_gradients_norms(weight):
    layer = draw(4, 3, seed=4).requires_grad_()
    base, against = (layer * 7).square().sum(), torch.tanh(layer).sum()
    gradient = lambda loss: torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()
    norms = gradient(base), gradient(against)
    on_base, one = objective(weight=weight).factors(*norms, step=0)
    torch.testing.assert_close(gradient(on_base * base), weight * gradient(one * against), rtol=1e-12, atol=0)
    one, on_adversarial = objective(weight=weight, balance="adversarial").factors(*norms, step=0)
    torch.testing.assert_close(gradient(on_adversarial * against), weight * gradient(one * base), rtol=1e-12, atol=0)
    assert [float(f) for f in objective(weight=weight, balance="none").factors(*norms, step=0)] == [1, weight]


def test_before_its_start_the_discriminator_does_not_steer():
    norms = torch.tensor(2.0), torch.tensor(4.0)
    assert [float(f) for f in objective(start=3).factors(*norms, step=2)] == [1, 0]
    assert [float(f) for f in objective(start=3, weight=0.5).factors(*norms, step=3)] == [1, 1]
    vanishing = objective(weight=1.0).factors(torch.tensor(0.0), torch.tensor(1.0), step=0)
    assert [float(f) for f in vanishing] == [1e4, 1], "the factor is bounded"


def objective(**settings):
    return Adversarial(base=AYFEMD(), discriminator=Conv(), **settings)


def test_it_is_its_base_with_the_discriminator_left_out():
    from flowmap.flow.path import Linear

    t, s = draw_times()
    sample = Linear().sample(draw(seed=1), draw(seed=2), t, s)
    base = AYFEMD(warmup_steps=10)
    value = lambda of, step: of(ExactStudent(scale=0.9), GAUSSIAN, sample, step).value
    assert value(Adversarial(base=base, discriminator=Conv()), 5) == value(base, 5) != value(base, 0)
    assert not objective().diagonal and Adversarial(base=FlowMatching(), discriminator=Conv()).diagonal


@dataclass
class Shifted:
    """A student whose map is x + shift (s - t), and that counts its calls with a graph."""

    shift: torch.Tensor
    calls: tuple = ()

    def mean_velocity(self, x, t, s, cond=None):
        return self.shift.expand_as(x)

    def __call__(self, x, t, s, cond=None):
        self.calls += (torch.is_grad_enabled(),)
        return x + (s - t)[:, None, None, None] * self.shift


@pytest.mark.parametrize("sampler", [Deterministic(), Gamma(gamma=1.0), Gamma(gamma=0.5)])
def test_samples_keep_the_graph_of_their_last_call_or_of_all(sampler):
    for steps in (1, 2, 4):
        samples = {}
        for through in ("last", "all"):
            student = Shifted(torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
            x = generate(sampler, student, draw(seed=1), None, steps=steps, generator=seeded(), through=through)
            (slope,) = torch.autograd.grad(x.sum(), student.shift)
            wanted = [through == "all"] * (steps - 1) + [True]
            assert student.calls == tuple(wanted)
            samples[through] = x.detach()
            if isinstance(sampler, Deterministic):  # jumps of 1 / steps each
                torch.testing.assert_close(
                    -slope / x.numel(), torch.tensor(1.0 if through == "all" else 1 / steps, dtype=torch.float64)
                )
        assert torch.equal(samples["last"], samples["all"])
    with torch.no_grad():
        assert not generate(
            sampler, student, draw(seed=1), None, steps=2, generator=seeded(), through="last"
        ).requires_grad


class Points(nn.Module):
    """A discriminator of points in the plane."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x, cond=None, noise=None):
        return self.net(x).squeeze(1)


def test_a_discriminator_learns_to_tell_two_gaussians_apart():
    torch.manual_seed(0)
    net = Points()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    pair = lambda n: (torch.randn(n, 2) + torch.tensor([1.5, 0.0]), torch.randn(n, 2) - torch.tensor([1.5, 0.0]))
    for _ in range(100):
        optimizer.zero_grad()
        discriminator_loss(net, *pair(128), r1=0.01, r2=0.01).value.backward()
        optimizer.step()
    real, fake = pair(2000)
    ranked = float((net(real) > net(fake)).float().mean())
    assert ranked == pytest.approx(0.983, abs=0.02)  # the best of all: P(N(3, 2) > 0), the difference along the axis


@pytest.mark.parametrize("balance", ["none", "base"])
def test_a_student_in_the_plane_comes_nearer_to_the_data(balance):
    """The base objective keeps the student x1 -> scale x1 + place at a wrong distribution.

    With the adversarial loss, the student moves to the data's distribution.
    """
    torch.manual_seed(0)
    data = lambda n: 0.5 * torch.randn(n, 2) + torch.tensor([2.0, -1.0])
    student, net = nn.Linear(2, 2), Points()
    with torch.no_grad():
        student.weight.copy_(torch.eye(2))
        student.bias.zero_()
    adversarial = Adversarial(
        base=AYFEMD(), discriminator=Conv(), balance=balance, weight=20.0 if balance == "none" else 0.05
    )
    optimizers = (
        torch.optim.Adam(student.parameters(), lr=2e-2),
        torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.0, 0.9)),
    )
    for step in range(250):
        x1, real = torch.randn(64, 2), data(64)
        fake = student(x1)
        base, against = (fake - x1).square().mean(), generator_loss(net, real, fake)
        norms = (torch.autograd.grad(loss, student.weight, retain_graph=True)[0].norm() for loss in (base, against))
        factors = adversarial.factors(*norms, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (factors[0] * base + factors[1] * against).backward()
        net.zero_grad()
        discriminator_loss(net, real, fake.detach(), r1=0.1, r2=0.1).value.backward()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        distance = (student.bias - torch.tensor([2.0, -1.0])).norm()
        assert float(distance) < 0.5, "from 2.24 at the start"
        assert float((student.weight @ student.weight.T - torch.eye(2) / 4).norm()) < 0.5, "from 1.06 at the start"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"balance": "both"}, "balance: 'both' is not one of base, adversarial, none"),
        ({"through": "first"}, "through: 'first' is not one of last, all"),
        ({"steps": ()}, "steps"),
        ({"steps": (0, 1)}, "steps"),
        ({"weight": -1.0}, "weight: -1.0 must be 0 or more"),
        ({"r1": float("nan")}, "r1: nan"),
        ({"r2": -0.1}, "r2: -0.1"),
        ({"discriminator_lr": 0.0}, "discriminator_lr: 0.0"),
        ({"discriminator_betas": (0.0, 1.0)}, "discriminator_betas"),
        ({"start": -1}, "start: -1"),
        ({"start": 3, "discriminator_start": 4}, "discriminator_start: 4 is more than start, 3"),
        ({"base": Reconstruction()}, "base: must be"),
        ({"base": Adversarial(base=AYFEMD(), discriminator=Conv())}, "base: must be"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Adversarial(**{"base": AYFEMD(), "discriminator": Conv(), **settings})
