"""The distribution-matching terms: still where the student's law is the teacher's, and towards it from every side.

On Gaussians and a mixture velocities, mean velocities and the end-point velocity are known in closed form.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import TERMS, FlowMatching
from flowmap.objectives.mean_velocity_match import MeanVelocityMatch
from flowmap.objectives.reverse_kl import ReverseKL
from flowmap.objectives.self_fake import SelfFake
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import MIXTURE, Watched, bent, drawn
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, draw_times

OTHER = GaussianTeacher(mean=(-0.3,), std=1.1)
ONE = [TERMS[kind]() for kind in TERMS if kind != "twin"]  # that is in test_twin.py
EACH = pytest.mark.parametrize("term", [*ONE, *(replace(one, normalised=False) for one in ONE)], ids=str)


class Oracle(nn.Module):
    """What a term asks of a law: its velocity, as a fake that has learned it, or its own exact flow map."""

    def __init__(self, law, term):
        super().__init__()
        self.law, self.exact, self.velocity_alone = law, ExactStudent(law), term.fake_steps > 0

    def mean_velocity(self, x, t, s, cond=None):
        if self.velocity_alone:
            assert torch.equal(t, s), "a fake is a velocity"
            return self.law.velocity(x, t, cond)
        return self.exact.mean_velocity(x, t, s, cond)


def noised(x0, t=None, s=None, cond=None):
    later, earlier = draw_times(len(x0))
    t, s = later if t is None else t, earlier if s is None else s
    return Linear().sample(x0, draw(*x0.shape, seed=7), t, s, cond)


def pull(term, law, teacher, x0):
    x0 = x0.clone().requires_grad_()
    return torch.autograd.grad(term(Oracle(law, term), teacher, noised(x0), 0).value, x0)[0]


@EACH
@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_still_where_the_laws_agree(term, teacher):
    x0 = draw(*(SHAPE if teacher is GAUSSIAN else (5, 2)))
    if isinstance(term, SelfFake):  # an exact map of a mixture is a solved ODE, differentiated by differences
        term = replace(term, derivative="difference" if teacher is MIXTURE else "forward")
    accuracy = 1e-6 if isinstance(term, SelfFake) else 1e-14
    assert float(pull(term, teacher, teacher, x0).abs().max()) < accuracy
    assert float(pull(term, OTHER, teacher, x0).abs().max()) > 1e-4


def slopes(term, place, size, rows=3000):
    """The gradient in place and size of the generator x1 -> place + size x1, whose samples' law is exact."""
    place, size = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (place, size))
    law = GaussianTeacher(mean=(place.item(),), std=size.item())
    t = torch.linspace(0.05, 0.95, rows, dtype=torch.float64)
    sample = noised(place + size * draw(rows, 2, seed=3), t=t, s=t / 2)
    return [float(g) for g in torch.autograd.grad(term(Oracle(law, term), GAUSSIAN, sample, 0).value, [place, size])]


@EACH
def test_towards_the_teachers_law_from_every_side(term):
    """Shifted left and right, too narrow and too wide."""
    m, c = GAUSSIAN.mean[0], GAUSSIAN.std
    for off in (0.3, -0.3):
        of_place, of_size = slopes(term, m + off, c)[0], slopes(term, m, c + off)[1]
        assert math.copysign(1, off) * of_place > 1e-3 and math.copysign(1, off) * of_size > 1e-3
    assert slopes(term, m, c) == pytest.approx([0, 0], abs=1e-10)


@EACH
def test_descent_ends_at_the_teachers_law(term):
    place, size = -0.5, 1.3
    for _ in range(300):
        of_place, of_size = slopes(term, place, size, rows=200)
        place, size = place - 0.5 * of_place, size - 0.5 * of_size
    assert (place, size) == pytest.approx((GAUSSIAN.mean[0], GAUSSIAN.std), abs=0.05), "from -0.5 and 1.3"


def by_hand(term, teacher, sample, real, fake):
    """The value and the gradient in x0 of DMD's formula, for velocities of both."""
    t = broadcast_time(sample.t, sample.xt)
    g = t * (real - fake)
    away = (sample.x0 - (sample.xt - t * real)).detach().abs().flatten(1).mean(1)
    g = (g / broadcast_time(away, g) if term.normalised else g).detach()
    return g.square().mean() / 2, g / g.numel()


@EACH
def test_value_and_gradient_are_those_of_the_formula_by_hand(term):
    x0 = draw().requires_grad_()
    sample = noised(x0)
    x, t, s = sample.xt.detach(), sample.t, sample.s
    real, fake = GAUSSIAN.velocity(x, t), OTHER.velocity(x, t)
    if isinstance(term, MeanVelocityMatch):
        real, fake = euler(GAUSSIAN, x, t, s, term.euler_steps), euler(OTHER, x, t, s, term.euler_steps)
    if isinstance(term, SelfFake):  # v - w~ is v - w times df/dx, here S(0) / S(t)
        share = broadcast_time(OTHER.std / OTHER.spread(t), x)
        fake = real - share * (real - fake)
    loss = term(Oracle(OTHER, term), GAUSSIAN, sample, 0)
    value, gradient = by_hand(term, GAUSSIAN, sample, real, fake)
    torch.testing.assert_close(loss.value.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss.value, x0)[0], gradient)


def euler(law, x, t, s, steps):
    """The mean velocity of Euler's method: from the start and the end of its run."""
    y = x
    for i in range(steps):
        y = y + broadcast_time((s - t) / steps, x) * law.velocity(y, t + i * (s - t) / steps)
    return (y - x) / broadcast_time(s - t, x)


def test_mean_velocities_on_the_diagonal_are_velocities():
    sample = noised(draw())
    sample = replace(sample, s=sample.t)
    one, other = (term(Oracle(OTHER, term), GAUSSIAN, sample, 0).value for term in (MeanVelocityMatch(), ReverseKL()))
    torch.testing.assert_close(one, other)


def test_mean_velocities_tend_to_the_flow_maps():
    sample = noised(draw())
    exact = GAUSSIAN.mean_velocity(sample.xt, sample.t, sample.s)
    error = [
        float((MeanVelocityMatch(euler_steps=n)._mean(GAUSSIAN.velocity, sample) - exact).abs().max()) for n in (16, 32)
    ]
    assert error[1] < 0.6 * error[0] < 0.05, "of first order"


@EACH
def test_the_gradient_goes_to_the_samples_alone(term):
    network, x0, teacher, cond = bent(), draw().requires_grad_(), Watched(GAUSSIAN), drawn().cond
    sample = noised(x0, cond=cond)
    term(network, teacher, sample, 0).value.backward()
    assert x0.grad is not None and all(p.grad is None for p in network.parameters())
    assert teacher.asked[2] is cond and torch.equal(teacher.asked[0].shape and sample.xt.detach(), sample.xt.detach())


@EACH
def test_both_are_asked_with_the_samples_condition(term):
    asked = []

    class Asked(Oracle):
        def mean_velocity(self, x, t, s, cond=None):
            asked.append(cond)
            return super().mean_velocity(x, t, s, cond)

    cond, teacher = drawn().cond, Watched(GAUSSIAN)
    term(Asked(OTHER, term), teacher, noised(draw(), cond=cond), 0)
    assert teacher.asked[2] is cond and asked and all(one is cond for one in asked)


def test_the_fake_learns_by_flow_matching():
    sample, fake = drawn(), bent()
    for term in (ReverseKL(), MeanVelocityMatch()):
        assert term.learn(fake, sample).value == FlowMatching()(fake, None, sample, 0).value


@EACH
def test_without_a_teacher_it_refuses(term):
    with pytest.raises(ValueError, match="compares with a teacher's velocity; add a teacher"):
        term(Oracle(OTHER, term), None, noised(draw()), 0)
