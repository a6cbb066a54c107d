"""MeanFlow: stationary at the exact map, descends to it from both sides, equals its formula by hand.

With guidance, it learns the guided flow.
"""

import pytest
import torch
from torch import nn

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.distance import Adaptive, Squared
from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import AYFEMD, OBJECTIVES, MeanFlow
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
    Nearly,
    Watched,
    bent,
    drawn,
    gradients,
    pull,
    same,
    squares,
    still_and_towards,
    teachers,
)
from tests.support.oracle import draw, draw_times

SUM = Squared(mean=False)
tangents = pytest.mark.parametrize("tangent", ["target", "student"])
CLASSES = torch.tensor([0, -1, 1, 2, 0])


def residual(student, v, sample, direction):
    """F - v + (t - s) dF/dt by central differences."""
    x, t, s, cond, h = sample.xt, sample.t, sample.s, sample.cond, 1e-5
    with torch.no_grad():
        ahead, behind = (student.mean_velocity(x + e * direction, t + e, s, cond) for e in (h, -h))
        return student.mean_velocity(x, t, s, cond) - v + broadcast_time(t - s, x) * (ahead - behind) / (2 * h)


@tangents
@teachers
@pytest.mark.parametrize("distance", [SUM, Adaptive()])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(tangent, teacher, shape, distance):
    accuracy = (
        1e-5 if teacher is MIXTURE else 1e-10
    )  # the mixture's map is integrated; the adaptive weight magnifies by 1000
    still_and_towards(
        MeanFlow(distance=distance, tangent=tangent),
        teacher,
        drawn(shape),
        accuracy=accuracy * (100 if distance != SUM else 1),
    )


@tangents
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("teacher", [None, WEAK])
def test_value_and_gradient_are_those_of_the_formula_by_hand(tangent, derivative, teacher):
    sample, student = drawn(guidance=torch.linspace(1, 3, 5).double()), bent(guidance=True)
    v = sample.vt if teacher is None else WEAK.velocity(sample.xt, sample.t)
    direction = v if tangent == "target" else student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond).detach()
    g = residual(student, v, sample, direction)
    objective = MeanFlow(distance=SUM, tangent=tangent, derivative=derivative)
    near = 1e-5 if derivative == "difference" else 1e-7  # a one-sided step of 1e-7
    loss = objective(student, teacher, sample, 0)
    torch.testing.assert_close(loss.value.detach(), squares(g), rtol=near, atol=near)
    torch.testing.assert_close(loss.logs["residual_norm"], g.flatten(1).norm(dim=1), rtol=near, atol=near)
    same(gradients(objective, student, teacher, sample), pull(student, sample, g), near)


def test_with_a_teacher_and_squares_it_is_ayf_emd_without_its_normalisation():
    sample, student = drawn(), bent()
    emd = AYFEMD(warmup_steps=0, r_max=1.0, norm="none")
    same(gradients(MeanFlow(distance=SUM), student, WEAK, sample), gradients(emd, student, WEAK, sample))


def test_by_default_each_sample_is_weighted_by_its_own_error():
    sample, student = drawn(), bent()
    g = residual(student, sample.vt, sample, sample.vt)
    e = g.square().flatten(1).sum(1)
    same(gradients(MeanFlow(), student, None, sample), pull(student, sample, g / broadcast_time(e + 1e-3, g)), 1e-7)


def test_without_a_teacher_the_exact_map_is_still_on_average():
    """Over many draws the gradient at the exact map vanishes, within five standard errors; off it, it points back."""
    n, teacher = 40_000, GaussianTeacher(mean=(0.7,), std=0.4)
    t, s = draw_times(n)
    sample = Linear().sample(
        0.7 + 0.4 * draw(n, 3, seed=1), draw(n, 3, seed=2), t, s, {"row": torch.zeros(n, dtype=torch.int64)}
    )
    slope = lambda **off: gradients(MeanFlow(distance=SUM), Nearly(teacher, **off), None, sample)[1].sum() / 3
    error = 2 * 1.5 / (3 * n) ** 0.5  # the residual's std is below 1.5
    assert abs(slope()) < 5 * error
    assert slope(shift=0.1) > 0.1 > -0.1 > slope(shift=-0.1)


def test_on_the_diagonal_it_is_flow_matching():
    t, _ = draw_times()
    sample, student = drawn(t=t, s=t), bent()
    g = (student.mean_velocity(sample.xt, t, t) - sample.vt).detach()
    same(gradients(MeanFlow(distance=SUM), student, None, sample), pull(student, sample, g))


def test_the_teacher_is_asked_at_the_departure_with_the_condition():
    sample, teacher = drawn(), Watched(WEAK)
    MeanFlow()(bent(), teacher, sample, 0)
    x, t, cond = teacher.asked
    assert torch.equal(x, sample.xt) and torch.equal(t, sample.t) and cond is sample.cond


class Guided(nn.Module):
    """On the diagonal: the guided velocity of MIXTURE's classes with a class, the plain one without.

    Both are multiplied by a trained factor.
    """

    def __init__(self, scale, factor=1.0):
        super().__init__()
        self.scale, self.factor = scale, nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def mean_velocity(self, x, t, s, cond):
        plain = MIXTURE.velocity(x, t)
        there = broadcast_time(cond["class"] >= 0, x)
        return self.factor * torch.where(
            there, self.scale * MIXTURE.velocity(x, t, cond) + (1 - self.scale) * plain, plain
        )


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.6), (2.5, 0.0), (0.5, 0.8)])
def test_guidance_in_the_target_leads_to_the_guided_flow(omega, kappa):
    """The scale is omega / (1 - kappa).

    Samples without a class keep the plain velocity, and there is no guidance outside the interval.
    """
    t, _ = draw_times()
    sample = drawn((5, 2), t=t, s=t, **{"class": CLASSES})
    objective, right = MeanFlow(distance=SUM, omega=omega, kappa=kappa), omega / (1 - kappa)
    assert objective(Guided(right), MIXTURE, sample, 0).value < 1e-20
    assert objective(Guided(right + 0.1), MIXTURE, sample, 0).value > 1e-6
    for sign in (+1, -1):
        assert sign * gradients(objective, Guided(right, 1 + 0.02 * sign), MIXTURE, sample)[0] > 1e-4
    late = MeanFlow(distance=SUM, omega=omega, kappa=kappa, guided=(0.999, 1.0))
    assert late(Guided(1.0), MIXTURE, sample, 0).value < 1e-20 < late(Guided(right), MIXTURE, sample, 0).value


def test_guidance_moves_target_and_tangent_by_the_students_own_predictions():
    sample, student = drawn(**{"class": CLASSES}), bent(classes=3)
    x, t, cond = sample.xt, sample.t, sample.cond
    with torch.no_grad():
        given, plain = (
            student.mean_velocity(x, t, t, {**cond, "class": c}) for c in (CLASSES, torch.full_like(CLASSES, -1))
        )
    v = torch.where(broadcast_time(CLASSES >= 0, x), 1.5 * sample.vt + 0.25 * given + (1 - 1.75) * plain, sample.vt)
    objective = MeanFlow(distance=SUM, omega=1.5, kappa=0.25)
    same(gradients(objective, student, None, sample), pull(student, sample, residual(student, v, sample, v)), 1e-7)


def test_guidance_without_classes_is_refused():
    with pytest.raises(ValueError, match="objective.omega.*classes"):
        MeanFlow(omega=2.0)(bent(), None, drawn(), 0)


SETTINGS = [{"tangent": "own"}, {"derivative": "ridden"}, {"kappa": 1.0}, {"omega": 0.0}, {"guided": (0.5, 0.2)}]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MeanFlow(**setting)


def test_defaults_are_the_papers():
    assert OBJECTIVES["meanflow"] is MeanFlow and not MeanFlow.diagonal
    assert MeanFlow().distance == Adaptive(power=1.0, offset=1e-3) and (MeanFlow().omega, MeanFlow().kappa) == (
        1.0,
        0.0,
    )
