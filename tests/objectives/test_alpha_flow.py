"""alpha-Flow: trajectory flow matching at its start, MeanFlow at its end, its own formula by hand between."""

import math

import pytest
import torch

from flowmap.flow.distance import Squared
from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import OBJECTIVES, AlphaFlow, MeanFlow
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
    Nearly,
    bent,
    drawn,
    gradients,
    pull,
    same,
    slopes,
    squares,
    still_and_towards,
    teachers,
)
from tests.support.oracle import GAUSSIAN, draw_times, slope

SUM = Squared(mean=False)
POINT = GaussianTeacher(mean=(0.7,), std=1e-9)  # straight paths
GUIDANCE = torch.linspace(1, 3, 5).double()
LATE = 4  # alpha is 0 from here on


def at(alpha, **settings):
    """(An objective, a step at which its alpha is this, up to 1/2.)"""
    gamma = 4 * math.log(1 / alpha - 1) if alpha < 0.5 else 1.0
    step = 3 if alpha < 0.5 else 2
    objective = AlphaFlow(distance=SUM, end_steps=LATE, gamma=gamma, clamp=0.0, **settings)
    assert objective.alpha(step) == pytest.approx(alpha)
    return objective, step


def mixed(**cond):
    """Rows 1 and 4 on the diagonal."""
    t, s = draw_times()
    return drawn(s=torch.where(torch.tensor([False, True, False, False, True]), t, s), **cond)


class Counted:
    """A student that counts its calls."""

    def __init__(self, student):
        self.student, self.calls = student, 0

    def mean_velocity(self, *given):
        self.calls += 1
        return self.student.mean_velocity(*given)


def test_alpha_falls_from_one_to_zero_along_a_sigmoid():
    objective = AlphaFlow(begin_steps=100, end_steps=300)
    alpha = torch.tensor([objective.alpha(step) for step in range(401)])
    assert alpha[:100].eq(1).all() and alpha[300:].eq(0).all() and alpha[200] == 0.5
    assert (alpha[1:] <= alpha[:-1]).all()
    torch.testing.assert_close(alpha, 1 - alpha.flip(0))
    inside = alpha[(alpha > 0) & (alpha < 1)]
    assert 0.005 <= inside.min() < 0.006 and len(inside) == 85  # 200 log(1 / 0.005 - 1) 2 / 25 steps
    assert objective.alpha(210) == pytest.approx(1 / (1 + math.exp(25 * 0.05)))
    assert AlphaFlow(begin_steps=7, end_steps=7).alpha(6) == 1 and AlphaFlow(begin_steps=7, end_steps=7).alpha(7) == 0


@teachers
def test_at_its_end_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape):
    accuracy = 1e-5 if teacher is MIXTURE else 1e-10  # the mixture's map is integrated
    objective = AlphaFlow(distance=SUM, end_steps=LATE)
    still_and_towards(objective, teacher, drawn(shape), accuracy=accuracy, step=LATE)


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.01])
def test_where_paths_are_straight_every_alpha_is_still_at_the_exact_map_and_leads_to_it(alpha):
    objective, step = at(alpha)
    still_and_towards(objective, POINT, drawn(), accuracy=1e-6, step=step)  # 1e-9 of spread, over alpha
    start = AlphaFlow(distance=SUM, begin_steps=1)
    still_and_towards(start, POINT, drawn(), accuracy=1e-6)


@teachers
def test_the_exact_maps_residual_falls_as_alpha(teacher, shape):
    """R is a difference over alpha (t - s), and 1 - alpha of it: the error is of order alpha."""
    alphas = [0.04, 0.02, 0.01]
    errors = []
    for alpha in alphas:
        objective, step = at(alpha)
        errors.append(float(objective(Nearly(teacher), teacher, drawn(shape), step).value.detach()) ** 0.5)
    assert slope(alphas, errors) == pytest.approx(1, abs=0.1)


@teachers
def test_before_its_end_the_exact_map_is_led_back_to_from_further_away_than_alpha(teacher, shape):
    objective, step = at(0.01)
    for sign in (+1, -1):
        by_scale, _ = slopes(objective, Nearly(teacher, scale=1 + 0.05 * sign), teacher, drawn(shape), step)
        _, by_shift = slopes(objective, Nearly(teacher, shift=0.05 * sign), teacher, drawn(shape), step)
        assert sign * by_scale > 1e-3 and sign * by_shift > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.03])
@pytest.mark.parametrize("tangent", ["target", "student"])
@pytest.mark.parametrize("teacher", [None, WEAK])
def test_between_its_gradient_is_the_papers_by_hand(alpha, tangent, teacher):
    """That of |F - (alpha v + (1 - alpha) F(y, m, s))|^2 / alpha, rows on the diagonal included."""
    (objective, step), sample, student = at(alpha, tangent=tangent), mixed(guidance=GUIDANCE), bent(guidance=True)
    x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
    v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
    direction = v if tangent == "target" else student.mean_velocity(x, t, t, cond)
    m = t - alpha * (t - s)
    target = alpha * v + (1 - alpha) * student.mean_velocity(x - broadcast_time(t - m, x) * direction, m, s, cond)
    value = squares(student.mean_velocity(x, t, s, cond) - target.detach()) / alpha
    expected = torch.autograd.grad(value, list(student.parameters()))
    same(gradients(objective, student, teacher, sample, step), expected)
    torch.testing.assert_close(objective(student, teacher, sample, step).value.detach(), value.detach() / alpha)


def test_halfway_with_the_students_own_jump_for_v_it_is_a_shortcut():
    """With v = F(x, t, m) the paper's target is PSD's; here y is an Euler step, the same where paths are straight."""
    objective, step = at(0.5)
    sample, student = drawn(), Nearly(POINT, scale=1.1)
    m = (sample.t + sample.s) / 2
    first = student.mean_velocity(sample.xt, sample.t, m, sample.cond)
    there = sample.xt - broadcast_time(sample.t - m, first) * POINT.velocity(sample.xt, sample.t)
    second = student.mean_velocity(there, m, sample.s, sample.cond)
    target = (POINT.velocity(sample.xt, sample.t) + second) / 2
    F = student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond)
    same(gradients(objective, student, POINT, sample, step), pull(student, sample, ((F - target) / 0.5).detach()))


def test_at_its_start_it_is_trajectory_flow_matching_in_one_call():
    sample, student = drawn(), bent()
    F = student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond)
    objective = AlphaFlow(distance=SUM, begin_steps=10)
    same(gradients(objective, student, None, sample, 9), pull(student, sample, (F - sample.vt).detach()))
    counted = Counted(student)
    objective(counted, None, sample, 9)
    assert counted.calls == 1
    (between, step), counted = at(0.2), Counted(student)
    between(counted, None, sample, step)
    assert counted.calls == 2


@pytest.mark.parametrize("settings", [{}, {"tangent": "student"}, {"distance": SUM, "derivative": "forward"}])
def test_at_its_end_it_is_meanflow_and_tends_to_it(settings):
    sample, student = mixed(), bent()
    meanflow, ended = MeanFlow(**settings), AlphaFlow(**settings, end_steps=LATE)
    expected = gradients(meanflow, student, WEAK, sample)
    assert all(map(torch.equal, gradients(ended, student, WEAK, sample, LATE), expected))
    objective, step = at(1e-4, **{key: value for key, value in settings.items() if key != "distance"})
    near = gradients(MeanFlow(**{**settings, "distance": SUM}), student, WEAK, sample)
    scale = max(float(g.abs().max()) for g in near)
    for a, b in zip(gradients(objective, student, WEAK, sample, step), near, strict=True):
        assert float((a - b).abs().max()) < 2e-3 * scale


def test_float32_stays_float32_and_finite_at_the_ends_of_time_and_without_a_row_off_the_diagonal():
    (objective, step), student = at(0.2), bent().float()
    ends = drawn(t=torch.tensor([1, 1, 0, 0.5, 1e-7]).double(), s=torch.tensor([0, 1, 0, 0, 0]).double())
    single = Linear().sample(*(value.float() for value in (ends.x0, ends.x1, ends.t, ends.s)), ends.cond)
    value = objective(student, WEAK, single, step).value
    assert value.dtype == torch.float32 and bool(torch.isfinite(value))
    still = drawn(t=draw_times()[0], s=draw_times()[0])
    _, rate = objective._derive(bent(), still.xt, still.t, still.s, still.vt, still.cond, 1, step)
    assert bool(torch.isfinite(rate).all())  # a row that stands in for none, with sharded weights
    expected = gradients(MeanFlow(distance=SUM), bent(), GAUSSIAN, still)
    same(gradients(objective, bent(), GAUSSIAN, still, step), expected)


@pytest.mark.parametrize("setting", [{"begin_steps": 9, "end_steps": 8}, {"clamp": 0.5}, {"gamma": 0.0}])
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        AlphaFlow(**setting)


def test_defaults_are_the_papers():
    assert OBJECTIVES["alpha_flow"] is AlphaFlow and not AlphaFlow.diagonal
    assert (AlphaFlow().gamma, AlphaFlow().clamp) == (25.0, 0.005) and AlphaFlow().distance == MeanFlow().distance
