"""Reward tuning: the loss by hand, and with a score distillation as base the Gaussian law that it ends at.

x0 = place + size x1 is N(place, size^2). With the exact fake, at noise level t and S(c)^2 = (1 - t)^2 c^2 + t^2:
for r = x the minimum is place = m + lambda S(c)^2, size = c; for r = -x^2 / 2 it is S(size)^-2 = S(c)^-2 + lambda and
place = m / (1 + lambda S(c)^2), with lambda = scale / t^2. As t falls this is the tilted law p(x) exp(lambda r(x)) / Z.
"""

from __future__ import annotations

import math

import pytest
import torch

from flowmap.flow.path import Linear
from flowmap.flow.types import Loss
from flowmap.objectives import AYFEMD, OBJECTIVES, Adversarial, FlowMatching, RewardTuning, ScoreDistillation
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import bent, drawn, same
from tests.objectives.test_score_distillation import Affine, Fake
from tests.support.oracle import GAUSSIAN, draw

M, C = 0.7, 0.4
TEACHER = GaussianTeacher(mean=(M,), std=C, shape=(1,))
# every moment that a quadratic loss takes of x1 and of the noise, exactly, in four rows
X1 = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
NOISE = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
REWARDS = {"linear": lambda x, cond: x[:, 0], "quadratic": lambda x, cond: -x[:, 0].square() / 2}


def expected(name, strength, t):
    """(place, size) at the minimum, at noise level t; the tilted law for t = 0."""
    at = (1 - t) ** 2 * C**2 + t**2
    if name == "linear":
        return M + strength * at, C
    return M / (1 + strength * at), math.sqrt(1 / (1 / at + strength) - t**2) / (1 - t)


def loss_of(generator, name, strength, t):
    objective = RewardTuning(ScoreDistillation(normalised=False), REWARDS[name], scale=strength * t**2)
    x0, times = generator(X1), torch.full((4,), t, dtype=torch.float64)
    sample = Linear().sample(x0, NOISE, times, times, None)
    base = objective.base(Fake(generator.law()), TEACHER, sample, 0)
    return objective.with_reward(base, None, x0, None).value


def slopes(place, size, *settings):
    generator = Affine(place, size)
    return [float(one) for one in torch.autograd.grad(loss_of(generator, *settings), [generator.place, generator.size])]


@pytest.mark.parametrize("t", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(("name", "strength"), [("linear", 2.0), ("quadratic", 3.0)])
def test_still_at_the_law_of_the_formula_and_descending_from_all_sides(name, strength, t):
    place, size = expected(name, strength, t)
    assert slopes(place, size, name, strength, t) == pytest.approx([0, 0], abs=1e-12)
    for off in (0.05, -0.05):
        assert math.copysign(1, off) * slopes(place + off, size, name, strength, t)[0] > 1e-6
        assert math.copysign(1, off) * slopes(place, size + off, name, strength, t)[1] > 1e-6
    assert max(map(abs, slopes(M, C, name, strength, t))) > 1e-4, "the teacher's law is no minimum"


@pytest.mark.parametrize(("name", "strength"), [("linear", 2.0), ("quadratic", 3.0)])
def test_descent_ends_at_the_tilted_law_to_two_percent(name, strength):
    generator = Affine(M, C)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 200)
        optimizer.zero_grad()
        loss_of(generator, name, strength, 0.005).backward()
        optimizer.step()
    place, size = expected(name, strength, 0.0)
    assert generator.place.item() == pytest.approx(place, rel=0.02)
    assert generator.size.item() ** 2 == pytest.approx(size**2, rel=0.02)


def test_the_loss_is_the_bases_minus_the_scaled_reward():
    x0, base = draw().requires_grad_(), Loss(torch.tensor(3.0, dtype=torch.float64), {"residual_norm": torch.ones(5)})
    reward = lambda x, cond: x.flatten(1).mean(1) * cond["class"]
    cond = {"class": torch.arange(5)}
    loss = RewardTuning(AYFEMD(), reward, scale=0.25).with_reward(base, None, x0, cond)
    mean = reward(x0, cond).mean()
    torch.testing.assert_close(loss.value, 3 - 0.25 * mean)
    torch.testing.assert_close(loss.logs["reward"], mean.detach())
    assert loss.logs["base"] == 3 and "residual_norm" in loss.logs and not loss.logs["reward"].requires_grad
    torch.testing.assert_close(
        *(torch.autograd.grad(one, x0)[0] for one in (loss.value, -0.25 * reward(x0, cond).mean()))
    )


def test_of_itself_it_is_its_base():
    student, sample = bent(), drawn()
    ours, base = RewardTuning(AYFEMD(), REWARDS["linear"]), AYFEMD()
    losses = [one(student, GAUSSIAN, sample, 7) for one in (ours, base)]
    assert losses[0].value == losses[1].value and ours.distillation is ours.base
    same(*(torch.autograd.grad(one.value, list(student.parameters()), allow_unused=True) for one in losses), 0)
    assert OBJECTIVES["reward_tuning"] is RewardTuning and not ours.diagonal and ours.draws_samples


def test_latents_are_decoded_before_they_are_rewarded():
    class Student:
        def pictures(self, x):
            return 3 * x

    x0 = draw().requires_grad_()
    loss = RewardTuning(AYFEMD(), lambda x, cond: x.flatten(1).sum(1))
    found = loss.with_reward(Loss(torch.zeros(())), Student(), x0, None)
    torch.testing.assert_close(found.value, -3 * x0.sum() / 5)


def test_mistakes_are_named():
    for settings, says in (
        ({"through": "first"}, "through: 'first' is not one of last, all"),
        ({"steps": ()}, "steps"),
        ({"scale": -1.0}, "scale: -1.0 must be 0 or more"),
        ({"base": RewardTuning(AYFEMD(), REWARDS["linear"])}, "base: must be an objective that trains a flow map"),
        ({"base": Adversarial(AYFEMD(), None)}, "base: must be an objective that trains a flow map"),
    ):
        with pytest.raises(ValueError, match=says):
            RewardTuning(**{"base": AYFEMD(), "reward": REWARDS["linear"], **settings})
    with pytest.raises(ValueError, match="objective.reward: has no gradient"):
        RewardTuning(AYFEMD(), REWARDS["linear"]).with_reward(Loss(torch.zeros(())), None, draw(4, 1), None)
    assert FlowMatching.diagonal  # what check refuses as a base
