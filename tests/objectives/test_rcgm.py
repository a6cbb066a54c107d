"""RCGM: its formula by hand, still at the exact map as its interval goes to 0, alpha-Flow's residual at order 1."""

import math

import pytest
import torch

from flowmap.flow.distance import Adaptive, Squared
from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import OBJECTIVES, RCGM, AlphaFlow, MeanFlow
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
    squares,
    still_and_towards,
    teachers,
)
from tests.support.oracle import GAUSSIAN, draw_times, slope

SUM, FAR = Squared(mean=False), 1e6
POINT = GaussianTeacher(mean=(0.7,), std=1e-9)  # straight paths
GUIDANCE = torch.linspace(1, 3, 5).double()


@teachers
@pytest.mark.parametrize("order", [1, 2])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, order):
    """Up to its step by Euler, whose error is of the order of the interval, a tenth of the least pull back or less."""
    interval, least = (1e-4, 2e-3) if teacher is MIXTURE else (1e-6, 1.0)  # the mixture's map is integrated
    objective = RCGM(distance=SUM, order=order, interval=interval)
    still_and_towards(objective, teacher, drawn(shape), accuracy=2e-4, least=least)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_where_paths_are_straight_every_interval_is_still_at_the_exact_map_and_leads_to_it(order):
    for interval in (0.01, 0.3):
        objective = RCGM(distance=SUM, order=order, interval=interval)
        still_and_towards(objective, POINT, drawn(), accuracy=1e-5)  # 1e-9 of spread, over the interval


@teachers
@pytest.mark.parametrize("order", [1, 2])
def test_the_exact_maps_residual_falls_as_the_interval(teacher, shape, order):
    intervals = [0.02, 0.01, 0.005]
    errors = []
    for interval in intervals:
        objective = RCGM(distance=SUM, order=order, interval=interval, clamp=FAR)
        errors.append(float(objective(Nearly(teacher), teacher, drawn(shape), 0).value.detach()) ** 0.5)
    assert slope(intervals, errors) == pytest.approx(1, abs=0.1)


def residual(student, v, sample, order, interval):
    """((t - s) F - P) / (t - m) - v, row by row; v - F on the diagonal, turned round."""
    x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
    step = torch.minimum(torch.full_like(t, interval), t - s)
    m = t - step
    y, displaced = x - broadcast_time(step, x) * v, torch.zeros_like(x)
    for k in range(order):
        a, b = (m + (s - m) * j / order for j in (k, k + 1))
        jump = broadcast_time(a - b, x) * student.mean_velocity(y, a, b, cond)
        y, displaced = y - jump, displaced + jump
    F = student.mean_velocity(x, t, s, cond)
    inside = (broadcast_time(t - s, x) * F - displaced) / broadcast_time(step, x) - v
    return torch.where(broadcast_time(t == s, x), F - v, inside).detach()


@pytest.mark.parametrize("settings", [{"order": 1}, {"order": 2}, {"order": 3}, {"order": 2, "clamp": 0.2}])
@pytest.mark.parametrize("teacher", [None, WEAK])
@pytest.mark.parametrize("interval", [0.01, 0.1])
def test_value_and_gradient_are_those_of_the_formula_by_hand(settings, teacher, interval):
    """Row 0 is shorter than the longer interval, row 1 on the diagonal."""
    t, s = draw_times()
    s = torch.stack([t[0] - 0.05, t[1], *s[2:]])
    sample, student = drawn(s=s, guidance=GUIDANCE), bent(guidance=True)
    v = sample.vt if teacher is None else WEAK.velocity(sample.xt, t)
    limit = settings.get("clamp", 1.0)
    g = residual(student, v, sample, settings["order"], interval)
    assert bool((g < -limit).any()) and bool((g > limit).any())
    g = g.clamp(-limit, limit)
    objective = RCGM(distance=SUM, interval=interval, **settings)
    torch.testing.assert_close(objective(student, teacher, sample, 0).value.detach(), squares(g))
    same(gradients(objective, student, teacher, sample), pull(student, sample, g), 1e-8)


def test_at_order_one_it_is_alpha_flow_with_a_step_of_constant_length():
    """All intervals alike, so that one alpha gives that length."""
    t = torch.linspace(0.4, 1, 5).double()
    sample, student, alpha = drawn(t=t, s=t - 0.4), bent(), 0.1
    flow = AlphaFlow(distance=SUM, end_steps=4, gamma=4 * math.log(1 / alpha - 1), clamp=0.0)
    one = gradients(RCGM(distance=SUM, order=1, interval=0.04, clamp=FAR), student, WEAK, sample)
    same(one, gradients(flow, student, WEAK, sample, 3))


def test_it_tends_to_meanflow_and_is_flow_matching_on_the_diagonal():
    sample, student = drawn(), bent()
    near = gradients(MeanFlow(distance=SUM), student, WEAK, sample)
    scale = max(float(g.abs().max()) for g in near)
    for order in (1, 3):
        found = gradients(RCGM(distance=SUM, order=order, interval=1e-5, clamp=FAR), student, WEAK, sample)
        gap = max(float((a - b).abs().max()) for a, b in zip(found, near, strict=True))
        assert (gap < 1e-3 * scale) == (order == 1)  # jumps of the student differ from one while it is not a flow map
    still = drawn(t=draw_times()[0], s=draw_times()[0])
    expected = gradients(MeanFlow(distance=SUM), bent(), GAUSSIAN, still)
    same(gradients(RCGM(distance=SUM, clamp=FAR), bent(), GAUSSIAN, still), expected)


def test_float32_stays_float32_and_finite_at_the_ends_of_time():
    ends = drawn(t=torch.tensor([1, 1, 0, 0.5, 1e-7]).double(), s=torch.tensor([0, 1, 0, 0, 0]).double())
    single = Linear().sample(*(value.float() for value in (ends.x0, ends.x1, ends.t, ends.s)), ends.cond)
    value = RCGM()(bent().float(), WEAK, single, 0).value
    assert value.dtype == torch.float32 and bool(torch.isfinite(value))


@pytest.mark.parametrize("setting", [{"order": 0}, {"interval": 0.0}, {"clamp": 0.0}, {"kappa": 1.0}])
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RCGM(**setting)


def test_defaults_are_twinflows():
    assert OBJECTIVES["rcgm"] is RCGM and not RCGM.diagonal and RCGM().derivative is None
    assert (RCGM().order, RCGM().interval, RCGM().clamp) == (2, 0.01, 1.0)
    assert RCGM().distance == Adaptive(power=0.5, offset=1e-6, mean=True)
