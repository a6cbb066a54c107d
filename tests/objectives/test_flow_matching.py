"""Flow matching: still at the truth, towards it from both sides, and indifferent to arrival times."""

import pytest
import torch
from torch import nn

from flowmap.flow.distance import PseudoHuber, Squared
from flowmap.flow.path import Linear
from flowmap.objectives import OBJECTIVES, FlowMatching
from flowmap.teachers.exact import GaussianTeacher
from flowmap.teachers.guidance import Autoguidance
from tests.support.oracle import GAUSSIAN, RING, ExactStudent, draw, draw_times


class Nearly(nn.Module):
    """The exact mean velocity, times scale, plus shift: one number each, that train."""

    def __init__(self, teacher, scale=1.0, shift=0.0):
        super().__init__()
        self.exact = ExactStudent(teacher)
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def mean_velocity(self, x, t, s, cond=None):
        self.asked = (t, s, cond)
        return self.scale * self.exact.mean_velocity(x, t, s, cond) + self.shift


def drawn(*shape, cond=None):
    x0, x1, (t, s) = draw(*shape, seed=1), draw(*shape, seed=2), draw_times()
    return Linear().sample(x0, x1, t, s, cond)


def gradient(student, teacher, sample, objective=None):
    loss = (objective or FlowMatching())(student, teacher, sample, 0)
    return torch.stack(torch.autograd.grad(loss.value, [student.scale, student.shift]))


BOTH = pytest.mark.parametrize(("teacher", "shape"), [(GAUSSIAN, ()), (RING, (5, 2))], ids=["gaussian", "ring"])


@BOTH
@pytest.mark.parametrize("distance", [Squared(), PseudoHuber()])
def test_still_at_the_truth_and_towards_it_from_both_sides(teacher, shape, distance):
    sample, objective = drawn(*shape), FlowMatching(distance)
    assert gradient(Nearly(teacher), teacher, sample, objective).abs().max() < 1e-12
    for sign in (+1, -1):
        assert sign * gradient(Nearly(teacher, scale=1 + 0.02 * sign), teacher, sample, objective)[0] > 1e-3
        assert sign * gradient(Nearly(teacher, shift=0.02 * sign), teacher, sample, objective)[1] > 1e-3


@BOTH
def test_descent_reaches_the_truth(teacher, shape):
    sample, student = drawn(*shape), Nearly(teacher, scale=0.98, shift=0.02)
    optimizer = torch.optim.LBFGS(student.parameters(), lr=1, max_iter=30, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = FlowMatching()(student, teacher, sample, 0).value
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(student.scale.detach(), torch.ones_like(student.scale), rtol=0, atol=1e-8)
    torch.testing.assert_close(student.shift.detach(), torch.zeros_like(student.shift), rtol=0, atol=1e-8)


def test_value_is_the_mean_square_to_the_teacher_or_else_to_the_conditional_velocity():
    sample, student = drawn(), Nearly(GAUSSIAN, scale=1.3)
    v = GAUSSIAN.velocity(sample.xt, sample.t)
    for teacher, target in ((GAUSSIAN, v), (None, sample.x1 - sample.x0)):
        loss = FlowMatching()(student, teacher, sample, 0)
        error = (1.3 * v - target).square().flatten(1).mean(1)
        torch.testing.assert_close(loss.value.detach(), error.mean())
        torch.testing.assert_close(loss.logs["error"], error)
        assert not loss.logs["error"].requires_grad


def test_without_a_teacher_the_truth_is_the_mean_of_the_conditional_velocity():
    """Over many draws the gradient at the exact velocity vanishes, within five standard errors.

    Off the exact velocity it does not vanish, and points back.
    """
    n = 40_000
    ones = torch.ones(n, dtype=torch.float64)
    teacher = GaussianTeacher(mean=(0.7,), std=0.4)
    x0, x1, t = 0.7 + 0.4 * draw(n, 3, seed=1), draw(n, 3, seed=2), 0.6 * ones
    sample = Linear().sample(x0, x1, t, t)
    error = 2 / (3 * n) ** 0.5  # the velocity's conditional std is below 1
    assert gradient(Nearly(teacher), None, sample).abs().max() < 5 * error
    assert (
        gradient(Nearly(teacher, shift=0.1), None, sample)[1]
        > 0.1
        > -0.1
        > gradient(Nearly(teacher, shift=-0.1), None, sample)[1]
    )


def test_the_student_is_asked_on_the_diagonal_with_its_condition_and_arrival_plays_no_part():
    cond = {"class": torch.tensor([0, 1, -1, 2, 1])}
    sample, student = drawn(cond=cond), Nearly(GAUSSIAN, scale=1.1)
    value = FlowMatching()(student, GAUSSIAN, sample, 0).value
    t, s, seen = student.asked
    assert torch.equal(t, sample.t) and torch.equal(s, sample.t) and seen is cond
    moved = Linear().sample(sample.x0, sample.x1, sample.t, 0 * sample.s, cond)
    assert torch.equal(value, FlowMatching()(student, GAUSSIAN, moved, 7).value)
    assert FlowMatching.diagonal and OBJECTIVES["flow_matching"] is FlowMatching


def test_guidance_reaches_the_teacher_and_no_gradient_does():
    weak = GaussianTeacher(mean=(0.1,), std=0.9)
    teacher = Autoguidance(GAUSSIAN, weak)
    w = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64)
    sample = drawn(cond={"guidance": w})
    v = w.reshape(5, 1, 1, 1) * GAUSSIAN.velocity(sample.xt, sample.t) + (1 - w).reshape(5, 1, 1, 1) * weak.velocity(
        sample.xt, sample.t
    )
    student = Nearly(GAUSSIAN)
    expected = (GAUSSIAN.velocity(sample.xt, sample.t) - v).square().mean()
    torch.testing.assert_close(FlowMatching()(student, teacher, sample, 0).value.detach(), expected)

    learned = Nearly(GAUSSIAN, scale=1.2)
    learned.velocity = lambda x, t, cond=None: learned.mean_velocity(x, t, t, cond)
    FlowMatching()(student, learned, sample, 0).value.backward()
    assert learned.scale.grad is None and student.scale.grad is not None


def test_a_permutation_of_the_batch_changes_nothing():
    sample, order = drawn(cond={"guidance": torch.linspace(1, 3, 5).double()}), torch.tensor([3, 0, 4, 2, 1])
    shuffled = Linear().sample(
        sample.x0[order],
        sample.x1[order],
        sample.t[order],
        sample.s[order],
        {"guidance": sample.cond["guidance"][order]},
    )
    student, teacher = Nearly(GAUSSIAN, scale=1.1), Autoguidance(GAUSSIAN, GaussianTeacher(std=0.9))
    a, b = (FlowMatching()(student, teacher, given, 0) for given in (sample, shuffled))
    torch.testing.assert_close(a.value, b.value)
    torch.testing.assert_close(a.logs["error"][order], b.logs["error"])
