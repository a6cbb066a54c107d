"""The term twin: still where the laws agree, towards the law of the data from every side, and a twin that learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import TERMS, FlowMatching, Joint, MeanFlow
from flowmap.objectives.matching import descend
from flowmap.objectives.twin import Twin
from flowmap.recipe import read_recipe
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import MIXTURE, Watched, bent, drawn
from tests.support.oracle import GAUSSIAN, SHAPE, draw, draw_times

OTHER = GaussianTeacher(mean=(-0.3,), std=1.1)
TAUGHT = pytest.mark.parametrize("taught", [True, False], ids=["teacher", "alone"])
NORMALISED = pytest.mark.parametrize("normalised", [True, False])


class Both(nn.Module):
    """A student that has learned both halves: the velocity of the data, and by its twin that of its samples' law."""

    def __init__(self, data, samples):
        super().__init__()
        self.data, self.samples = data, samples

    def mean_velocity(self, x, t, s, cond=None):
        if torch.equal(s, t + 1):
            return self.samples.velocity(x, t, cond)
        assert torch.equal(s, t), "a velocity"
        return self.data.velocity(x, t, cond)


def noised(x0, t=None, cond=None):
    t = draw_times(len(x0))[0] if t is None else t
    return Linear().sample(x0, draw(*x0.shape, seed=7), t, t, cond)


def gradient(term, data, samples, x0, taught):
    x0 = x0.clone().requires_grad_()
    loss = term(Both(data, samples), data if taught else None, noised(x0), 0)
    return torch.autograd.grad(loss.value, x0)[0]


@TAUGHT
@NORMALISED
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_still_where_the_laws_agree(data, normalised, taught):
    x0 = draw(*(SHAPE if data is GAUSSIAN else (5, 2)))
    term = Twin(normalised=normalised)
    assert float(gradient(term, data, data, x0, taught).abs().max()) < 1e-14
    assert float(gradient(term, data, OTHER, x0, taught).abs().max()) > 1e-4


def slopes(term, place, size, taught, rows=3000):
    """The gradient in place and size of the generator x1 -> place + size x1, whose twin has learned its law."""
    place, size = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (place, size))
    law = GaussianTeacher(mean=(place.item(),), std=size.item())
    sample = noised(place + size * draw(rows, 2, seed=3), t=torch.linspace(0.05, 0.95, rows, dtype=torch.float64))
    value = term(Both(GAUSSIAN, law), GAUSSIAN if taught else None, sample, 0).value
    return [float(g) for g in torch.autograd.grad(value, [place, size])]


@TAUGHT
@NORMALISED
def test_towards_the_law_of_the_data_from_every_side(normalised, taught):
    m, c, term = GAUSSIAN.mean[0], GAUSSIAN.std, Twin(normalised=normalised)
    for off in (0.3, -0.3):
        of_place, of_size = slopes(term, m + off, c, taught)[0], slopes(term, m, c + off, taught)[1]
        assert math.copysign(1, off) * of_place > 1e-3 and math.copysign(1, off) * of_size > 1e-3
    assert slopes(term, m, c, taught) == pytest.approx([0, 0], abs=1e-10)


@TAUGHT
def test_descent_ends_at_the_law_of_the_data(taught):
    place, size = -0.5, 1.3
    for _ in range(300):
        of_place, of_size = slopes(Twin(), place, size, taught, rows=200)
        place, size = place - 0.5 * of_place, size - 0.5 * of_size
    assert (place, size) == pytest.approx((GAUSSIAN.mean[0], GAUSSIAN.std), abs=0.05), "from -0.5 and 1.3"


class AsTwin:
    def __init__(self, student):
        self.student = student

    def mean_velocity(self, x, t, s, cond=None):
        return self.student.mean_velocity(x, t, t + 1, cond)


@TAUGHT
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_value_and_gradients_are_those_of_the_two_losses_by_hand(weight, taught):
    """The samples get matching.py's gradient alone, the network that of its twin's flow matching alone."""
    student, x0 = bent(guidance=True), draw().requires_grad_()
    cond = drawn(guidance=torch.linspace(1, 3, 5).double()).cond
    sample, teacher = noised(x0, cond=cond), GAUSSIAN if taught else None
    x, t = sample.xt.detach(), sample.t
    real = GAUSSIAN.velocity(x, t) if taught else student.velocity(x, t, cond).detach()
    fake = student.mean_velocity(x, t, t + 1, cond)
    assert not torch.allclose(fake, student.velocity(x, t, cond)) and not torch.allclose(real, student.velocity(x, t))
    moved = descend(sample, real, fake.detach(), normalised=True).value
    still = noised(x0.detach(), cond=cond)
    learned = FlowMatching()(AsTwin(student), None, still, 0).value
    loss = Twin(fake_weight=weight)(student, teacher, sample, 0).value
    torch.testing.assert_close(loss, moved + weight * learned)
    weights = list(student.parameters())
    found = torch.autograd.grad(loss, [x0, *weights], retain_graph=True, materialize_grads=True)
    torch.testing.assert_close(found[0], torch.autograd.grad(moved, x0)[0])
    for a, b in zip(found[1:], torch.autograd.grad(learned, weights, materialize_grads=True), strict=True):
        torch.testing.assert_close(a, weight * b)


def test_the_teacher_is_asked_with_the_samples_condition():
    teacher, cond = Watched(GAUSSIAN), drawn().cond
    Twin()(bent(), teacher, noised(draw(), cond=cond), 0)
    assert teacher.asked[2] is cond


def test_a_network_learns_the_law_of_its_samples_and_leaves_them_with_it():
    """Without a teacher: a generator beside a network that learns both halves at once ends at the law of the data."""
    torch.manual_seed(0)
    student, law = FlowMapNet(MLP(width=48, depth=1).build((1,))), GaussianTeacher(mean=(0.7,), std=0.4)
    generator = torch.tensor([0.2, 0.7], requires_grad=True)
    learns = torch.optim.Adam([*student.parameters(), generator], lr=1e-2)
    falls = torch.optim.lr_scheduler.MultiStepLR(learns, [900])
    for step in range(1100):
        t = torch.rand(256)
        data = Linear().sample(0.7 + 0.4 * torch.randn(256, 1), torch.randn(256, 1), t, t, None)
        own = Linear().sample(generator[0] + generator[1] * torch.randn(256, 1), torch.randn(256, 1), t, t, None)
        learns.zero_grad()
        (FlowMatching()(student, None, data, step).value + Twin()(student, None, own, step).value).backward()
        learns.step()
        falls.step()
    assert generator.tolist() == pytest.approx([law.mean[0], law.std], abs=0.12), "from 0.2 and 0.7"
    x, t = torch.linspace(0, 1.4, 9)[:, None], torch.full((9,), 0.5)
    with torch.no_grad():
        fake = student.mean_velocity(x, t, t + 1)
    torch.testing.assert_close(fake, law.velocity(x, t), rtol=0, atol=0.3)


def test_it_needs_a_flow_map_and_no_teacher():
    assert TERMS["twin"] is Twin and Twin().fake_steps == 0
    alone = ["teacher=null", "student={kind: dit, preset: tiny, patch: 2}"]
    assert read_recipe("digits-twin-flow", alone).objective.term == Twin(fake_weight=0.05)
    with pytest.raises(ValueError, match="objective.base: trains velocities alone"):
        read_recipe("digits-twin-flow", [*alone, "objective.base={kind: flow_matching}"])
    with pytest.raises(ValueError, match="add a teacher"):
        read_recipe("digits-joint", [*alone, "objective.base={kind: meanflow}"])
    with pytest.raises(ValueError, match="fake_weight"):
        Twin(fake_weight=-1.0)
    assert Joint(base=MeanFlow(), term=Twin()).matching.term.twin
