"""FreeFlow: still at the exact map, towards it from both sides, equal to its formula by hand, and blind to data."""

import pytest
import torch

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.distance import Adaptive, Squared
from flowmap.flow.path import Linear
from flowmap.flow.types import PathSample, broadcast_time
from flowmap.objectives import AYFLMD, OBJECTIVES, FreeFlow
from flowmap.teachers.guidance import Autoguidance
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
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
from tests.support.oracle import GAUSSIAN, draw, draw_times

GUIDANCE = torch.linspace(1, 3, 5).double()


@teachers
@pytest.mark.parametrize("distance", [Squared(mean=False), Adaptive()])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, distance):
    accuracy = (
        1e-5 if teacher is MIXTURE else 1e-10
    )  # the mixture's map is integrated; the adaptive weight magnifies by 1000
    still_and_towards(
        FreeFlow(distance), teacher, drawn(shape), accuracy=accuracy * (100 if distance == Adaptive() else 1)
    )


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_value_and_gradient_are_those_of_the_formula_by_hand(derivative):
    sample, student, h = drawn(guidance=GUIDANCE), bent(guidance=True), 1e-5
    teacher = Autoguidance(GAUSSIAN, WEAK)
    x, s, cond, one = sample.x1, sample.s, sample.cond, torch.ones(5).double()
    with torch.no_grad():
        F = student.mean_velocity(x, one, s, cond)
        ahead, behind = (student.mean_velocity(x, one, s + e, cond) for e in (h, -h))
        g = (
            F
            - teacher.velocity(x - broadcast_time(1 - s, x) * F, s, cond)
            - broadcast_time(1 - s, x) * (ahead - behind) / (2 * h)
        )
    objective, near = FreeFlow(derivative=derivative), 1e-5 if derivative == "difference" else 1e-7
    torch.testing.assert_close(objective(student, teacher, sample, 0).value.detach(), squares(g), rtol=near, atol=near)
    from_noise = Linear().sample(sample.x0, x, one, s, cond)
    same(gradients(objective, student, teacher, sample), pull(student, from_noise, g), near)
    lmd = AYFLMD(warmup_steps=0, r_max=1.0, norm="none")
    same(gradients(objective, student, teacher, sample), gradients(lmd, student, teacher, from_noise), near)


def test_data_departure_and_path_play_no_part():
    sample, student = drawn(guidance=GUIDANCE), bent(guidance=True)
    other = draw(seed=9)
    blind = PathSample(
        x0=other, x1=sample.x1, t=sample.t * 0.5 + 0.5, s=sample.s, xt=3 * other, vt=-other, cond=sample.cond
    )
    assert torch.equal(FreeFlow()(student, WEAK, sample, 0).value, FreeFlow()(student, WEAK, blind, 0).value)
    same(gradients(FreeFlow(), student, WEAK, sample), gradients(FreeFlow(), student, WEAK, blind), 0)
    moved = Linear().sample(sample.x0, sample.x1, sample.t, sample.s / 2, sample.cond)
    assert FreeFlow()(student, WEAK, sample, 0).value != FreeFlow()(student, WEAK, moved, 0).value


def test_the_teacher_is_asked_where_the_student_arrives_from_noise():
    sample, student, teacher = drawn(), bent(), Watched(WEAK)
    FreeFlow()(student, teacher, sample, 0)
    x, t, cond = teacher.asked
    torch.testing.assert_close(x, student(sample.x1, torch.ones(5).double(), sample.s).detach())
    assert torch.equal(t, draw_times()[1]) and cond is sample.cond


def test_without_a_teacher_it_refuses():
    with pytest.raises(ValueError, match="freeflow.*teacher"):
        FreeFlow()(bent(), None, drawn(), 0)
    with pytest.raises(ValueError, match="derivative"):
        FreeFlow(derivative="ridden")
    assert OBJECTIVES["freeflow"] is FreeFlow and not FreeFlow.diagonal
