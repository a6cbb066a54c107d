"""sCM: stationary at the exact map, descends to it from both sides.

It equals algorithm 1 of the paper on TrigFlow's own clock.
"""

import math

import pytest
import torch

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.path import Linear, Trig
from flowmap.flow.types import broadcast_time
from flowmap.objectives import OBJECTIVES, SCM
from tests.objectives.nearly import MIXTURE, WEAK, Watched, bent, drawn, gradients, same, still_and_towards, teachers
from tests.support.oracle import draw_times

D = 72
GUIDANCE = torch.linspace(1, 3, 5).double()


def exact(**settings):
    return SCM(**{"warmup_steps": 0, "norm": "none", **settings})


@teachers
@pytest.mark.parametrize("norm", ["none", "l2", "rms"])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, norm):
    accuracy = 1e-5 if teacher is MIXTURE else 1e-11  # the mixture's map is integrated
    t = draw_times()[0] / 2  # so that v and F point the same way in the mixture: the pull on a factor is their product
    still_and_towards(exact(norm=norm), teacher, drawn(shape, t=t, s=0 * t), accuracy=accuracy, least=1e-4)


def by_the_paper(student, v, sample, d, r, c, norm):
    """Algorithm 1 as printed: TrigFlow's angle, state and network.

    The derivative is a central difference along dx/da.
    """
    trig, x, t, cond, h = Trig(d), sample.xt, sample.t, sample.cond, 1e-5
    unit = math.pi / 2  # Trig counts its angle in quarter turns
    place, quarter = trig.from_linear(x, t)
    angle = quarter * unit

    def network(place, angle):
        linear, time = trig.to_linear(place, angle / unit)
        F = student.mean_velocity(linear, time, torch.zeros_like(time), cond)
        return Linear().convert(F, linear, time, source="linear_velocity", target="trig", sigma_data=d)

    moves = d * Linear().convert(v, x, t, source="linear_velocity", target="trig", sigma_data=d)
    with torch.no_grad():
        ahead, behind = (network(place + e * moves, angle + e) for e in (h, -h))
        N, rate = network(place, angle), (ahead - behind) / (2 * h)
        cos, sin = broadcast_time(angle.cos(), x), broadcast_time(angle.sin(), x)
        g = -cos * cos * (d * N - moves) - r * cos * sin * (place + d * rate)
        size = g.flatten(1).norm(dim=1)
        divisor = {"none": torch.ones_like(size), "l2": size + c, "rms": size / D**0.5 + c}[norm]
        target = N + g / broadcast_time(divisor, g)
    return (network(place, angle) - target).square().flatten(1).sum(1).mean() / D, size


@pytest.mark.parametrize("norm", ["none", "l2", "rms"])
@pytest.mark.parametrize("teacher", [None, WEAK])
@pytest.mark.parametrize(("step", "r"), [(6, 0.6), (100, 0.9), (0, 0.0)])
def test_value_and_gradient_are_those_of_algorithm_1_on_trigflow(norm, teacher, step, r):
    sample, student, d, c = drawn(guidance=GUIDANCE), bent(guidance=True), 0.7, 0.3
    v = sample.vt if teacher is None else WEAK.velocity(sample.xt, sample.t)
    value, size = by_the_paper(student, v, sample, d, r, c, norm)
    objective = SCM(sigma_data=d, warmup_steps=10, r_max=0.9, norm=norm, c=c)
    loss = objective(student, teacher, sample, step)
    torch.testing.assert_close(loss.value, value, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(loss.logs["residual_norm"], size, rtol=1e-6, atol=1e-7)
    assert loss.logs["tangent_weight"] == pytest.approx(r)
    same(
        gradients(objective, student, teacher, sample, step),
        torch.autograd.grad(value, list(student.parameters())),
        1e-7,
    )


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_derivative_gives_the_same(derivative):
    sample, student = drawn(), bent()
    same(
        gradients(exact(derivative=derivative), student, WEAK, sample), gradients(exact(), student, WEAK, sample), 1e-5
    )


def test_at_sigma_data_one_half_of_the_way_the_weight_is_one():
    """t = 1/2, sigma_data = 1: A^2 = 1/2, so the loss is (1/2)(1/2)^2 |F - v + t dF/dt|^2 / D at r = 1."""
    sample, student = drawn(t=torch.full((5,), 0.5).double(), s=torch.zeros(5).double()), bent()
    x, t = sample.xt, sample.t
    v = WEAK.velocity(x, t)
    F, rate = torch.func.jvp(
        lambda x, t: student.mean_velocity(x, t, torch.zeros_like(t)), (x, t), (v, torch.ones_like(t))
    )
    g = (F - v + 0.5 * rate).detach()
    expected = g.square().flatten(1).sum(1).mean() / 8 / D
    torch.testing.assert_close(exact(sigma_data=1.0)(student, WEAK, sample, 0).value.detach(), expected)


def test_the_arrival_is_the_data_whatever_the_sample_says():
    student, (t, s) = bent(), draw_times()
    one, other = drawn(t=t, s=s), drawn(t=t, s=0 * s)
    assert torch.equal(exact()(student, WEAK, one, 0).value, exact()(student, WEAK, other, 0).value)


def test_the_teacher_is_asked_at_the_departure_with_the_condition():
    sample, teacher = drawn(), Watched(WEAK)
    exact()(bent(), teacher, sample, 0)
    x, t, cond = teacher.asked
    assert torch.equal(x, sample.xt) and torch.equal(t, sample.t) and cond is sample.cond


def test_the_ends_of_time_are_finite_in_float32():
    t = torch.tensor([1, 1e-7, 0, 0.5, 1 - 1e-7]).double()
    sample = drawn(t=t, s=0 * t)
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    value = SCM(warmup_steps=0)(bent().float(), WEAK, single, 0).value
    assert value.dtype == torch.float32 and bool(torch.isfinite(value))


SETTINGS = [
    {"norm": "l1"},
    {"derivative": "ridden"},
    {"r_max": 1.5},
    {"warmup_steps": -1},
    {"c": -0.1},
    {"sigma_data": 0.0},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SCM(**setting)


def test_defaults_are_the_papers():
    assert OBJECTIVES["scm"] is SCM and not SCM.diagonal
    assert (SCM().sigma_data, SCM().warmup_steps, SCM().r_max, SCM().norm, SCM().c) == (0.5, 10_000, 1.0, "l2", 0.1)
