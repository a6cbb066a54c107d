"""Score distillation on Gaussians: no gradient where both distributions agree, and the formula by hand.

It descends to the teacher's distribution from every side.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import OBJECTIVES, FlowMatching, ScoreDistillation
from flowmap.objectives.score_distillation import Stopped
from flowmap.samplers import Deterministic, Gamma
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import MIXTURE, Watched, bent, drawn, same
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, draw_times, seeded

OTHER = GaussianTeacher(mean=(-0.3,), std=1.1)


class Fake(nn.Module):
    """The exact velocity of a law, as a fake that has learned it."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def mean_velocity(self, x, t, s, cond=None):
        assert torch.equal(t, s), "a fake is a velocity"
        self.asked = (x, t, cond)
        return self.law.velocity(x, t, cond)


def looked_at(x0, cond=None, t=None):
    """x0 with noise of its own at times of its own."""
    t = draw_times(len(x0))[0] if t is None else t
    return Linear().sample(x0, draw(*x0.shape, seed=7), t, t, cond)


def pull(objective, law, teacher, x0):
    x0 = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(Fake(law), teacher, looked_at(x0), 0).value, x0)
    return gradient


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_still_where_the_fake_says_what_the_teacher_says(teacher, normalised):
    x0 = draw(*(SHAPE if teacher is GAUSSIAN else (5, 2)))
    assert float(pull(ScoreDistillation(normalised=normalised), teacher, teacher, x0).abs().max()) == 0
    assert float(pull(ScoreDistillation(normalised=normalised), OTHER, teacher, x0).abs().max()) > 1e-4


@pytest.mark.parametrize("normalised", [True, False])
def test_value_and_gradient_are_those_of_the_formula_by_hand(normalised):
    """DMD's own terms: the two predictions of the data.

    Their difference is divided by the mean distance of the sample from the teacher's.
    """
    x0, t = draw().requires_grad_(), draw_times()[0]
    sample = looked_at(x0)
    loss = ScoreDistillation(normalised=normalised)(Fake(OTHER), GAUSSIAN, sample, 0)
    with torch.no_grad():
        guess = lambda law: sample.xt - broadcast_time(t, x0) * law.velocity(sample.xt, t)
        of_real, of_fake = x0 - guess(GAUSSIAN), x0 - guess(OTHER)
        away = of_real.abs().mean((1, 2, 3))
        g = (of_real - of_fake) / broadcast_time(away, x0) if normalised else of_real - of_fake
    torch.testing.assert_close(loss.value.detach(), g.square().mean() / 2)
    torch.testing.assert_close(torch.autograd.grad(loss.value, x0)[0], g / x0.numel())
    torch.testing.assert_close(loss.logs["distance_to_teacher"], away)
    torch.testing.assert_close(loss.logs["residual_norm"], (of_real - of_fake).flatten(1).norm(dim=1))


def test_the_guesses_are_the_exact_means_of_the_data():
    """E[x0 | xt] of a Gaussian: the difference of the predictions equals that of the posterior means.

    A test of the sign alone would be weaker.
    """
    x0, t = draw().requires_grad_(), draw_times()[0]
    sample = looked_at(x0)
    (g,) = torch.autograd.grad(ScoreDistillation(normalised=False)(Fake(OTHER), GAUSSIAN, sample, 0).value, x0)

    def posterior(law):
        m, c = law.mean[0], law.std
        share = broadcast_time(c**2 * (1 - t) / ((1 - t) ** 2 * c**2 + t**2), x0)
        return m + share * (sample.xt - broadcast_time(1 - t, x0) * m)

    torch.testing.assert_close(g * x0.numel(), (posterior(OTHER) - posterior(GAUSSIAN)).detach())


class Affine(nn.Module):
    """The generator x1 -> place + size x1: its samples are N(place, size^2), whose exact score is known."""

    def __init__(self, place, size):
        super().__init__()
        self.place, self.size = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (place, size))

    def forward(self, x1):
        return self.place + self.size * x1

    def law(self):
        return GaussianTeacher(mean=(self.place.item(),), std=self.size.item())


def slopes(place, size, normalised, rows=4000):
    generator, x1 = Affine(place, size), draw(rows, 2, seed=3)
    sample = looked_at(generator(x1), t=torch.linspace(0.05, 0.95, rows, dtype=torch.float64))
    loss = ScoreDistillation(normalised=normalised)(Fake(generator.law()), GAUSSIAN, sample, 0)
    return [float(g) for g in torch.autograd.grad(loss.value, [generator.place, generator.size])]


@pytest.mark.parametrize("normalised", [True, False])
def test_towards_the_teachers_law_from_both_sides(normalised):
    m, c = GAUSSIAN.mean[0], GAUSSIAN.std
    for off in (0.3, -0.3):
        of_place, _ = slopes(m + off, c, normalised)
        _, of_size = slopes(m, c + off, normalised)
        assert math.copysign(1, off) * of_place > 1e-3 and math.copysign(1, off) * of_size > 1e-3
    assert slopes(m, c, normalised) == pytest.approx([0, 0], abs=1e-12)


def test_descent_ends_at_the_teachers_law():
    generator = Affine(-0.5, 1.3)
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-2)
    for i in range(150):
        sample = looked_at(generator(draw(64, 2, seed=i)), t=torch.rand(64, generator=seeded(i), dtype=torch.float64))
        optimizer.zero_grad()
        ScoreDistillation()(Fake(generator.law()), GAUSSIAN, sample, 0).value.backward()
        optimizer.step()
    assert generator.place.item() == pytest.approx(GAUSSIAN.mean[0], abs=0.05), "from -0.5"
    assert generator.size.item() == pytest.approx(GAUSSIAN.std, abs=0.05), "from 1.3"


def test_the_gradient_goes_to_the_samples_alone():
    fake, x0, teacher = bent(), draw(), Watched(GAUSSIAN)
    x0 = x0.requires_grad_()
    cond = drawn().cond
    sample = looked_at(x0, cond)
    ScoreDistillation()(fake, teacher, sample, 0).value.backward()
    assert x0.grad is not None and all(p.grad is None for p in fake.parameters())
    x, t, given = teacher.asked
    assert torch.equal(x, sample.xt.detach()) and torch.equal(t, sample.t) and given is cond


def test_both_are_asked_at_the_same_place_with_the_same_condition():
    fake, teacher, cond = Fake(OTHER), Watched(GAUSSIAN), drawn().cond
    sample = looked_at(draw(), cond)
    sample = replace(sample, s=sample.s / 2)  # of no account
    ScoreDistillation()(fake, teacher, sample, 0)
    assert torch.equal(fake.asked[0], teacher.asked[0]) and torch.equal(fake.asked[1], sample.t)
    assert torch.equal(teacher.asked[1], sample.t) and fake.asked[2] is cond


def test_a_sample_where_the_teacher_has_it_does_not_divide_by_nothing():
    """At t = 0 the guesses are the sample itself."""
    x0 = draw().requires_grad_()
    value = ScoreDistillation()(Fake(OTHER), GAUSSIAN, looked_at(x0, t=torch.zeros(5).double()), 0).value
    assert float(value) == 0 and float(torch.autograd.grad(value, x0)[0].abs().max()) == 0


def test_the_fake_learns_by_flow_matching():
    sample, fake = drawn(), bent()
    loss, other = ScoreDistillation().term.learn(fake, sample), FlowMatching()(fake, None, sample, 0)
    assert loss.value == other.value
    same(*(torch.autograd.grad(one.value, list(fake.parameters()), allow_unused=True) for one in (loss, other)), 0)


def counted(student):
    calls = []

    class Counted(nn.Module):
        def forward(self, x, t, s, cond=None):
            calls.append((float(t[0]), float(s[0]), torch.is_grad_enabled()))
            return student(x, t, s, cond)

    return Counted(), calls


def test_a_run_is_stopped_at_a_jump_to_the_data_with_that_jumps_graph():
    """The second of four jumps of sampler gamma 1, by hand.

    A jump to the data, back to t = 3/4 with the generator's noise, and to the data.
    """
    exact = ExactStudent(GAUSSIAN, scale=0.9)
    student, calls = counted(exact)
    stopped = Stopped(student, 2)
    Gamma(gamma=1.0)(stopped, draw(seed=1), None, steps=4, generator=seeded(5))
    assert calls == [(1.0, 0.0, False), (0.75, 0.0, True)], "later calls cost nothing"
    one = torch.ones(5).double()
    first = exact(draw(seed=1), one, 0 * one)
    noise = torch.randn(SHAPE, generator=seeded(5)).double()
    torch.testing.assert_close(stopped.arrival, exact(0.25 * first + 0.75 * noise, 0.75 * one, 0 * one))


def test_samples_are_of_every_number_of_steps_and_every_jump():
    seen = []
    for seed in range(80):
        student, calls = counted(ExactStudent(GAUSSIAN))
        x0, jumps, departure = ScoreDistillation(steps=(1, 2, 4)).samples(
            Gamma(gamma=1.0), student, draw(seed=1), None, seeded(seed)
        )
        assert (
            len(calls) == jumps
            and [graph for *_, graph in calls] == [False] * (jumps - 1) + [True]
            and x0.shape == SHAPE
        )
        assert departure == calls[-1][0]
        seen.append(departure)
    assert set(seen) == {1.0, 0.75, 0.5, 0.25}
    shares = {1.0: 7 / 12, 0.5: 3 / 12, 0.75: 1 / 12, 0.25: 1 / 12}  # one, two or four steps, then one of their jumps
    for t, share in shares.items():  # 80 draws: a standard deviation of at most .055
        assert seen.count(t) / 80 == pytest.approx(share, abs=0.15)


def test_through_all_is_the_samplers_own_run_with_its_whole_graph():
    student = bent()
    objective = ScoreDistillation(steps=(2,), through="all")
    x0, jumps, departure = objective.samples(Deterministic(), student, draw(seed=1), drawn().cond, seeded())
    assert (jumps, departure) == (2, 0.5)
    torch.testing.assert_close(x0, Deterministic()(student, draw(seed=1), drawn().cond, steps=2))
    last = Stopped(student, 2)
    Deterministic()(last, draw(seed=1), drawn().cond, steps=2)
    weight = next(student.parameters())
    whole, part = (torch.autograd.grad(x.sum(), weight)[0] for x in (x0, last.arrival))
    torch.testing.assert_close(x0, last.arrival)
    assert float((whole - part).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": ()}, "steps"),
        ({"steps": (0, 1)}, "steps"),
        ({"fake_steps": 0}, "fake_steps: 0 must be 1 or more"),
        ({"through": "first"}, "through: 'first' is not one of last, all"),
        ({"fake_lr": 0.0}, "fake_lr: 0.0 must be above 0"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        ScoreDistillation(**settings)


def test_without_a_teacher_it_refuses():
    with pytest.raises(ValueError, match="reverse_kl compares with a teacher"):
        ScoreDistillation()(Fake(OTHER), None, looked_at(draw()), 0)
    assert OBJECTIVES["score_distillation"] is ScoreDistillation and not ScoreDistillation.diagonal
