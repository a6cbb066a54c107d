"""The anchored rule: the solver's own rule, Euler where paths are straight, another where they bend."""

import pytest
import torch

from flowmap.flow.solver import Euler, Heun, NoiseAnchored, invert
from flowmap.samplers import SAMPLERS, Anchored
from tests.support.oracle import GAUSSIAN, ExactStudent, draw
from tests.support.straight import StraightStudent, pair


def velocity_of(student):
    return lambda x, t: student.mean_velocity(x, t, t)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_on_straight_paths_it_is_euler_and_exact(steps):
    x0, x1 = pair()
    found = Anchored()(StraightStudent(), x1, steps=steps)
    torch.testing.assert_close(found, x0)
    torch.testing.assert_close(found, Euler(steps=steps)(velocity_of(StraightStudent()), x1).x)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_it_is_the_solvers_rule_and_by_hand(steps):
    x1, student = draw(), ExactStudent()
    found = Anchored()(student, x1, steps=steps)
    torch.testing.assert_close(found, NoiseAnchored(steps=steps)(velocity_of(student), x1).x)
    x = x1
    for i in range(steps, 0, -1):
        t, s = i / steps, (i - 1) / steps
        x = (1 - s) * (x - t * GAUSSIAN.velocity(x, torch.full((5,), t).double())) + s * x1
    torch.testing.assert_close(found, x)
    assert steps <= 2 or (found - Euler(steps=steps)(velocity_of(student), x1).x).abs().max() > 1e-3


def test_grids_and_start_are_those_of_few_step_samplers():
    x0, x1 = pair()
    torch.testing.assert_close(Anchored(middle=(0.35,))(StraightStudent(), x1, steps=2), x0)
    late = Anchored(t_max=0.9)
    assert late.times(2)[0] == 0.9 and torch.isfinite(late(StraightStudent(), x1, steps=2)).all()
    assert SAMPLERS["anchored"] is Anchored


def test_inversion_is_the_way_back():
    x1 = draw()
    solver = Heun(steps=200)
    x0 = solver(velocity_of(ExactStudent()), x1).x
    back = invert(velocity_of(ExactStudent()), x0, solver)
    torch.testing.assert_close(back.x, x1, rtol=0, atol=1e-4)  # order 2: 1 / 200^2
    truth = GAUSSIAN.flow_map(x0, torch.zeros(5).double(), torch.ones(5).double())
    torch.testing.assert_close(back.x, truth, rtol=0, atol=1e-3)
    assert back.calls == 400
