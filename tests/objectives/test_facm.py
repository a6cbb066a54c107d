"""FACM: stationary at the exact map, both of its terms lead back to it, and each equals its formula by hand."""

import math

import pytest
import torch

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.distance import Adaptive, Squared
from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.objectives import FACM, OBJECTIVES
from flowmap.recipe import RecipeError, read_recipe
from flowmap.teachers.exact import GaussianTeacher
from tests.conftest import TINY
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
    Leaning,
    Nearly,
    Watched,
    bent,
    drawn,
    gradients,
    same,
    slopes,
    still_and_towards,
    teachers,
)
from tests.support.oracle import draw, draw_times

GUIDANCE = torch.linspace(1, 3, 5).double()
MEAN = Squared()
data_too = pytest.mark.parametrize("to_data", [True, False])


def to(shape, to_data):
    """To the data from times at which v and F of the mixture point the same way: a factor's pull is their product."""
    t, s = draw_times()
    return drawn(shape, t=t / 2, s=0 * t) if to_data else drawn(shape, t=t, s=s)


@data_too
@teachers
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, to_data):
    """With the anchor, in all of its parts, and without it."""
    accuracy = 1e-4 if teacher is MIXTURE else 1e-10  # the mixture's map is integrated, and its root magnified
    for objective in (FACM(), FACM(anchor=0.0)):
        still_and_towards(objective, teacher, to(shape, to_data), accuracy=accuracy, least=1e-4)


@data_too
@teachers
def test_off_the_diagonal_the_consistency_term_alone_leads_back(teacher, shape, to_data):
    for sign in (+1, -1):
        assert sign * slopes(FACM(), Leaning(teacher, 0.05 * sign), teacher, to(shape, to_data))[0] > 1e-4
    assert FACM()(Leaning(teacher, 0.05), teacher, to(shape, to_data), 0).logs["anchor_error"].max() < 1e-12


@pytest.mark.parametrize("cosine", [0.0, 1.0])
def test_the_anchor_leads_the_velocity_back(cosine):
    """The anchor's part of the gradient is the difference that its weight makes."""
    sample = drawn()
    with_it, without = FACM(cosine=cosine), FACM(anchor=0.0)
    for sign in (+1, -1):
        student = Nearly(WEAK, shift=0.1 * sign)
        one, other = (slopes(objective, student, WEAK, sample)[1] for objective in (with_it, without))
        assert sign * (one - other) > 1e-2


def by_hand(student, v, sample, settings):
    x, t, s, cond, h = sample.xt, sample.t, sample.s, sample.cond, 1e-5
    F, own = student.mean_velocity(x, t, s, cond), student.mean_velocity(x, t, t, cond)
    with torch.no_grad():
        ahead, behind = (student.mean_velocity(x + e * v, t + e, s, cond) for e in (h, -h))
        g = F - v + broadcast_time(t - s, x) * (ahead - behind) / (2 * h)
        noise, limit = 1 - t, settings.get("clamp", 1.0)  # the paper's time
        target = F - broadcast_time(1 - noise ** settings.get("power", 0.5), x) * g.clamp(-limit, limit)
    e = (F - target).square().flatten(1).mean(1)
    consistency = torch.cos(noise * math.pi / 2) * e / (e.detach() + 1e-3).sqrt()
    along = (own * v).sum(1) / (own.square().sum(1) * v.square().sum(1)).sqrt()
    anchor = (own - v).square().flatten(1).mean(1) + settings.get("cosine", 1.0) * (1 - along).flatten(1).mean(1)
    return (consistency + settings.get("anchor", 1.0) * anchor).mean(), g


SETTINGS = [{}, {"clamp": 0.1}, {"power": 2.0, "clamp": 50.0}, {"anchor": 0.3, "cosine": 0.5}, {"cosine": 0.0}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("teacher", [None, WEAK])
def test_value_and_gradient_are_those_of_the_formula_by_hand(settings, teacher):
    t, s = draw_times()
    some = torch.where(torch.tensor([False, True, False, False, False]), t, s)  # one row on the diagonal
    sample, student = drawn(s=some, guidance=GUIDANCE), bent(guidance=True)
    v = sample.vt if teacher is None else WEAK.velocity(sample.xt, t)
    value, g = by_hand(student, v, sample, settings)
    loss = FACM(**settings)(student, teacher, sample, 0)
    torch.testing.assert_close(loss.value, value, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(loss.logs["residual_norm"], g.flatten(1).norm(dim=1), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(value, list(student.parameters()))
    same(gradients(FACM(**settings), student, teacher, sample), expected, 1e-7)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_derivative_gives_the_same(derivative):
    sample, student = drawn(), bent()
    near = 1e-5 if derivative == "difference" else 1e-8  # a one-sided step of 1e-7
    expected = gradients(FACM(), student, WEAK, sample)
    same(gradients(FACM(derivative=derivative), student, WEAK, sample), expected, near)


def test_without_a_teacher_the_exact_map_is_still_on_average():
    """Over many draws, within five standard errors, with squares, no cosine and a clamp out of reach."""
    n, teacher = 40_000, GaussianTeacher(mean=(0.7,), std=0.4)
    t, s = draw_times(n)
    sample = Linear().sample(
        0.7 + 0.4 * draw(n, 3, seed=1), draw(n, 3, seed=2), t, s, {"row": torch.zeros(n, dtype=torch.int64)}
    )
    objective = FACM(distance=MEAN, cosine=0.0, clamp=100.0)
    slope = lambda **off: float(gradients(objective, Nearly(teacher, **off), None, sample)[1].sum())
    error = 4 * 1.5 / (3 * n) ** 0.5  # two terms, each of a residual whose std is below 1.5
    assert abs(slope()) < 5 * error
    assert slope(shift=0.1) > 0.1 > -0.1 > slope(shift=-0.1)


def test_the_teacher_is_asked_once_at_the_departure_with_the_condition():
    sample, teacher = drawn(), Watched(WEAK)
    FACM()(bent(), teacher, sample, 0)
    x, t, cond = teacher.asked
    assert torch.equal(x, sample.xt) and torch.equal(t, sample.t) and cond is sample.cond


def test_near_the_data_the_consistency_term_has_no_gradient():
    t = torch.zeros(5).double()
    sample, student = drawn(t=t, s=t), bent()
    assert all(bool((g == 0).all()) for g in gradients(FACM(anchor=0.0), student, WEAK, sample))


def test_float32_stays_float32_and_finite_at_the_ends_of_time():
    sample = drawn(t=torch.tensor([1, 1, 0, 0.5, 1e-7]).double(), s=torch.tensor([0, 1, 0, 0, 0]).double())
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    student = bent().float()
    loss = FACM()(student, WEAK, single, 0)
    assert loss.value.dtype == torch.float32 and bool(torch.isfinite(loss.value))
    loss.value.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_a_cosine_without_a_teacher_is_refused(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(TINY)
    with pytest.raises(RecipeError, match="objective.cosine.*without one it must be 0"):
        read_recipe(path, ["objective={kind: facm}", "teacher=null", "student={kind: mlp}"])
    read_recipe(path, ["objective={kind: facm, cosine: 0}", "teacher=null", "student={kind: mlp}"])


@pytest.mark.parametrize("setting", [{"power": 0.0}, {"clamp": 0.0}, {"anchor": -1.0}, {"derivative": "x"}])
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        FACM(**setting)


def test_defaults_are_the_papers():
    assert OBJECTIVES["facm"] is FACM and not FACM.diagonal
    assert FACM().distance == Adaptive(power=0.5, offset=1e-3, mean=True)
    assert (FACM().anchor, FACM().cosine, FACM().power, FACM().clamp) == (1.0, 1.0, 0.5, 1.0)
