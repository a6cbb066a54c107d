"""Solvers as samplers: the order of each, the calls that they say they make, and no others."""

import pytest
import torch

from flowmap.flow.solver import RK4
from flowmap.samplers import Anchored, Deterministic, Solve, asked_for
from tests.support.oracle import GAUSSIAN, ExactStudent, draw, slope


class Counting:
    def __init__(self):
        self.calls = 0

    def mean_velocity(self, x, t, s, cond=None):
        assert torch.equal(t, s)
        self.calls += 1
        return (x * (1 + t.view(-1, 1, 1, 1))).sin() + x.mean()


@pytest.mark.parametrize("solver, calls, order", [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 4)])
def test_order_and_calls(solver, calls, order):
    x1 = draw()
    truth = RK4(steps=400)(lambda x, t: Counting().mean_velocity(x, t, t), x1).x
    errors = []
    for steps in (16, 32, 64):
        student, sampler = Counting(), Solve(solver=solver)
        errors.append((sampler(student, x1, steps=steps) - truth).abs().max())
        assert student.calls == calls * steps == sampler.calls(steps)
    assert slope([1 / 16, 1 / 32, 1 / 64], errors) == pytest.approx(order, abs=0.25)


def test_one_step_is_one_step_of_the_whole():
    sampler, x1 = Solve(solver="heun", grid="shifted", shift=3.0), draw()
    times, x = sampler.times(3), x1
    for t, s in zip(times, times[1:], strict=False):
        x = sampler.step(Counting(), x, t, s, None)
    torch.testing.assert_close(x, sampler(Counting(), x1, steps=3))
    student, plain = ExactStudent(GAUSSIAN), Deterministic()
    torch.testing.assert_close(plain.step(student, x1, 1.0, 0.0, None), plain(student, x1, steps=1))
    assert plain.calls(3) == 3


def test_a_solver_is_asked_for_on_the_grid_of_another_sampler():
    assert asked_for(Anchored(steps=(2,), t_max=0.9), solver="rk4") == Solve((2,), t_max=0.9, solver="rk4")
    assert asked_for(Solve(solver="rk4")) == Solve(solver="rk4")
    for settings in ({"solver": "eule"}, {"solver": "euler", "gamma": 0.5}):
        with pytest.raises(ValueError, match="solver"):
            asked_for(Deterministic(), **settings)
