"""Joint training: the base's loss as it is, the schedule of lambda, the samples of the term, a fake for each jump."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.times import LogitNormal, Uniform
from flowmap.nets.discriminator import Conv
from flowmap.objectives import AYFEMD, Adversarial, FlowMatching, Joint
from flowmap.objectives.matching import OfJump, descend
from flowmap.objectives.mean_velocity_match import MeanVelocityMatch
from flowmap.objectives.reverse_kl import ReverseKL
from flowmap.objectives.self_fake import SelfFake
from flowmap.samplers import Deterministic, Gamma
from flowmap.teachers.exact import GaussianTeacher, MixtureTeacher
from tests.objectives.nearly import bent, drawn
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, seeded


def joint(**settings):
    return Joint(base=AYFEMD(warmup_steps=10), term=ReverseKL(), **settings)


def test_it_is_its_base_with_the_term_left_out():
    base, sample = AYFEMD(warmup_steps=10), drawn()
    value = lambda of, step: of(ExactStudent(scale=0.9), GAUSSIAN, sample, step).value
    assert value(joint(), 5) == value(base, 5) != value(base, 0)
    assert joint().distillation == base and joint().matching == joint() and not joint().diagonal
    assert Joint(base=FlowMatching(), term=SelfFake()).diagonal
    judged = Adversarial(base=joint(), discriminator=Conv())
    assert judged.distillation == base and judged.matching == joint()


def test_lambda_is_nothing_before_its_start_and_then_rises_linearly():
    weights = [joint(weight=4.0, start=2, warmup_steps=3).weight_at(step) for step in range(7)]
    assert weights == pytest.approx([0, 0, 1, 2, 3, 4, 4])
    assert [joint(weight=0.5).weight_at(step) for step in (0, 9)] == [0.5, 0.5]


def test_its_times_are_pairs_for_a_term_of_intervals_alone():
    for term, still in ((ReverseKL(), True), (SelfFake(), True), (MeanVelocityMatch(), False)):
        t, s = Joint(base=AYFEMD(), term=term).times_of(Uniform())(50, generator=seeded())
        assert bool((t == s).all()) is still and bool((s <= t).all())
    assert joint(times=LogitNormal()).times_of(Uniform()) == LogitNormal()


@pytest.mark.parametrize("sampler", [Deterministic(middle=(0.3,)), Gamma(gamma=1.0)], ids=["deterministic", "gamma"])
def test_samples_are_whole_runs_of_every_number_of_steps(sampler):
    """Whole runs of the sampler itself; the graph is that of the last jump, which departs at `departure`."""
    seen = set()
    for seed in range(20):
        student = bent()
        made = joint(steps=(1, 2, 3)).samples(sampler, student, draw(seed=1), drawn().cond, seeded(seed))
        seen.add((made.jumps, made.departure))
        assert made.x0.requires_grad and made.x0.shape == SHAPE
        if sampler == Deterministic(middle=(0.3,)):
            whole = sampler(student, draw(seed=1), drawn().cond, steps=made.jumps)
            torch.testing.assert_close(made.x0, whole)
    assert seen == {(k, sampler.times(k)[k - 1]) for k in (1, 2, 3)}
    weight = next(student.parameters())
    part, every = (
        torch.autograd.grad(
            joint(steps=(2,), through=through).samples(sampler, student, draw(seed=1), drawn().cond, seeded()).x0.sum(),
            weight,
        )[0]
        for through in ("last", "all")
    )
    assert float((part - every).abs().max()) > 1e-6


class Told(nn.Module):
    """A fake with a law for each interval t - s that it is told."""

    def __init__(self, laws):
        super().__init__()
        self.laws = laws

    def mean_velocity(self, x, t, s, cond=None):
        (interval,) = {round(float(value), 6) for value in t - s}
        self.cond = cond
        return self.laws[interval].velocity(x, t, cond)


def test_a_fake_knows_which_jump_made_the_sample():
    """Its arrival input is t - s = 1 - departure, at every noise level; that of one jump from noise is the diagonal."""
    late, early = GaussianTeacher(mean=(-0.3,), std=1.1), GaussianTeacher(mean=(0.1,), std=0.6)
    fake, sample, cond = Told({0.0: early, 0.75: late}), drawn(), drawn().cond
    for departure, law in ((1.0, early), (0.25, late)):
        told = OfJump(fake, departure).mean_velocity(sample.xt, sample.t, sample.t, cond)
        torch.testing.assert_close(told, law.velocity(sample.xt, sample.t))
        assert fake.cond is cond
    with pytest.raises(NotImplementedError):
        OfJump(fake, 1.0)(sample.xt, sample.t, sample.t)


def test_a_mixture_of_jumps_can_agree_where_no_jump_does():
    """Why the fake is told: samples at -1 and at 1, half each, against a teacher of both.

    The gradient from the mixture's velocity vanishes; that from the law of either jump does not.
    """
    both = MixtureTeacher(means=((-1.0,), (1.0,)), std=(0.2,))
    left = GaussianTeacher(mean=(-1.0,), std=0.2)
    x0 = (-1 + 0.2 * draw(400, 1)).requires_grad_()
    t = torch.linspace(0.3, 0.9, 400, dtype=torch.float64)
    sample = Linear().sample(x0, draw(400, 1, seed=4), t, t)
    real = both.velocity(sample.xt.detach(), t)
    pull = lambda fake: torch.autograd.grad(descend(sample, real, fake, normalised=False).value, x0)[0] * x0.numel()
    assert float(pull(both.velocity(sample.xt.detach(), t)).abs().max()) == 0
    assert float(pull(left.velocity(sample.xt.detach(), t)).mean()) < -0.05, "towards the side that has no samples"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": ()}, "steps"),
        ({"steps": (0, 1)}, "steps"),
        ({"through": "first"}, "through: 'first' is not one of last, all"),
        ({"weight": -1.0}, "weight: -1.0"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        joint(**settings)
