"""CMT: stationary at the exact map, descends to it from both sides, equals its formula by hand.

Several rows share one trajectory.
"""

import pytest
import torch

from flowmap.flow.distance import PseudoHuber
from flowmap.flow.solver import RK4, Euler, Heun, NoiseAnchored
from flowmap.flow.types import PathSample, broadcast_time
from flowmap.objectives import CMT, OBJECTIVES
from flowmap.objectives.cmt import places
from flowmap.teachers.guidance import Autoguidance
from tests.objectives.nearly import (
    WEAK,
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
from tests.support.oracle import GAUSSIAN, draw, draw_times, slope

GUIDANCE = torch.linspace(1, 3, 5).double()


@teachers
@pytest.mark.parametrize("points", [1, 3])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, points):
    """Up to the solver's and the oracle's own integration."""
    objective = CMT(solver=RK4(steps=40), points=points)
    still_and_towards(objective, teacher, drawn(shape), accuracy=1e-4, off=0.02, least=1e-3)


def test_what_is_left_at_the_exact_map_is_the_solvers_error():
    counts = (10, 20, 40)
    for solver, order in ((Euler, 1), (Heun, 2)):
        sample, at = drawn(t=0 * GUIDANCE + 1, s=0 * GUIDANCE), Nearly(GAUSSIAN)
        values = [float(CMT(solver=solver(steps=n))(at, GAUSSIAN, sample, 0).value.detach()) for n in counts]
        assert slope([1 / n for n in counts], [v**0.5 for v in values]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("distance", [CMT().distance, PseudoHuber()])
def test_value_and_gradient_are_those_of_the_formula_by_hand(distance):
    sample, student, teacher = drawn(guidance=GUIDANCE), bent(guidance=True), Autoguidance(GAUSSIAN, WEAK)
    leader, times, states = torch.tensor([0, 0, 2, 2, 4]), [1.0, 0.75, 0.5, 0.25, 0.0], [sample.x1]
    with torch.no_grad():
        for t, s in zip(times, times[1:], strict=False):
            states.append(
                states[-1] + (s - t) * teacher.velocity(states[-1], torch.full((5,), t).double(), sample.cond)
            )
    t, s = sample.t, sample.s
    i = [min(round(4 * (1 - float(one))), 3) for one in t]
    j = [max(round(4 * (1 - float(one))), a + 1) for one, a in zip(s, i, strict=True)]
    x, y = (torch.stack([states[k][row] for k, row in zip(at, leader, strict=True)]) for at in (i, j))
    t, s = (torch.tensor([times[k] for k in at]).double() for at in (i, j))
    cond = {key: value[leader] for key, value in sample.cond.items()}
    value = distance(student.mean_velocity(x, t, s, cond), (x - y) / broadcast_time(t - s, x)).mean()
    objective = CMT(solver=Euler(steps=4), points=2, distance=distance)
    torch.testing.assert_close(objective(student, teacher, sample, 0).value, value)
    same(gradients(objective, student, teacher, sample), torch.autograd.grad(value, list(student.parameters())))


def test_times_fall_into_the_nearest_places_at_least_one_step_apart():
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    t, s = torch.tensor([1.0, 0.9, 0.6, 0.1, 0.0, 0.3]), torch.tensor([0.0, 0.85, 0.6, 0.1, 0.0, 0.15])
    i, j = places(times, t, s)
    assert i.tolist() == [0, 0, 2, 3, 3, 3] and j.tolist() == [4, 1, 3, 4, 4, 4]


@pytest.mark.parametrize(("points", "asked"), [(1, 5), (2, 3), (8, 1)])
def test_rows_share_a_trajectory_and_its_condition(points, asked):
    sample, teacher = drawn(), Watched(WEAK)
    CMT(solver=Heun(steps=2), points=points)(bent(), teacher, sample, 0)
    x, t, cond = teacher.asked
    assert len(x) == len(t) == asked and cond["row"].tolist() == list(range(0, 5, points))


def test_data_plays_no_part_and_no_graph_runs_through_the_teacher():
    sample, student, other = drawn(), bent(), draw(seed=9)
    blind = PathSample(x0=other, x1=sample.x1, t=sample.t, s=sample.s, xt=3 * other, vt=-other, cond=sample.cond)
    assert torch.equal(CMT()(student, WEAK, sample, 0).value, CMT()(student, WEAK, blind, 0).value)
    assert CMT()(student, WEAK, sample, 0).value != CMT()(student, WEAK, drawn(s=draw_times()[1] / 3), 0).value
    assert max(map(abs, slopes(CMT(), Nearly(GAUSSIAN, scale=1.1), GAUSSIAN, sample))) > 1e-3


def test_float32_is_finite_at_the_ends_of_time_on_either_grid():
    sample = drawn(t=torch.tensor([1, 1e-7, 0, 0.5, 1 - 1e-7]).double(), s=torch.zeros(5).double())
    single = PathSample(*(getattr(sample, name).float() for name in ("x0", "x1", "t", "s", "xt", "vt")), sample.cond)
    for grid in ("uniform", "rho"):
        value = CMT(solver=Heun(steps=6, grid=grid))(bent().float(), WEAK, single, 0).value
        assert value.dtype == torch.float32 and bool(torch.isfinite(value))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="points: 0 must be 1 or more"):
        CMT(points=0)
    with pytest.raises(ValueError, match="solver: the anchored rule"):
        CMT(solver=NoiseAnchored())
    with pytest.raises(ValueError, match="cmt follows the teacher's own trajectories"):
        CMT()(bent(), None, drawn(), 0)
    assert OBJECTIVES["cmt"] is CMT and not CMT.diagonal
