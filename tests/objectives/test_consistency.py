"""Discrete consistency: its grid, its error at the exact map, descends to it from both sides, equals its formula."""

import pytest
import torch

from flowmap.flow.path import Linear
from flowmap.flow.solver import rho_times, uniform_times
from flowmap.flow.types import broadcast_time
from flowmap.objectives import OBJECTIVES, SCM, Consistency
from flowmap.teachers.guidance import Autoguidance
from tests.objectives.nearly import WEAK, Nearly, Watched, bent, drawn, gradients, same, teachers
from tests.support.oracle import GAUSSIAN, draw_times, slope

GUIDANCE = torch.linspace(1, 3, 5).double()
solvers = pytest.mark.parametrize("solver", ["heun", "euler"])


def test_one_step_earlier_is_the_next_time_of_the_grid():
    for objective, times in (
        (Consistency(steps=9), rho_times(9)),
        (Consistency(steps=9, grid="uniform"), uniform_times(9)),
    ):
        times = torch.tensor(times, dtype=torch.float64)
        torch.testing.assert_close(objective.earlier(times[:-1]), times[1:])
        torch.testing.assert_close(objective.earlier(times[:-1].float()), times[1:].float())
        between = (times[:-1] + times[1:]) / 2
        assert (objective.earlier(between) <= times[1:]).all() and (objective.earlier(between[:-2]) > times[2:-1]).all()
        assert objective.earlier(torch.zeros(1)) == 0
    assert float(Consistency(steps=9).earlier(torch.ones(1).double())) == pytest.approx(rho_times(9)[1])


@pytest.mark.parametrize(("solver", "order"), [("heun", 3), ("euler", 2)])
@teachers
def test_the_error_at_the_exact_map_is_one_step_of_the_solver(solver, order, teacher, shape):
    """The exact map's residual is one step's local error: it falls as the step to the power of the order plus one."""
    t, counts = 0.3 + draw_times()[0] / 2, (20, 40, 80)
    of = lambda n: (
        Consistency(steps=n, grid="uniform", solver=solver)(Nearly(teacher), teacher, drawn(shape, t=t), 0).value
    )
    errors = [float(of(n).detach()) ** 0.5 for n in counts]
    assert slope([1 / n for n in counts], errors) == pytest.approx(order, abs=0.35)


@teachers
@pytest.mark.parametrize("grid", ["rho", "uniform"])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(teacher, shape, grid):
    """Still up to the solver: with ever more steps, Heun's error leaves the rest of the slope far behind."""
    t = draw_times()[0] / 2
    sample, objective = drawn(shape, t=t, s=0 * t), Consistency(steps=200, grid=grid)
    at = lambda **off: torch.stack([g.sum() for g in gradients(objective, Nearly(teacher, **off), teacher, sample)])
    for sign in (+1, -1):
        by_scale, by_shift = at(scale=1 + 0.02 * sign)[0], at(shift=0.02 * sign)[1]
        assert sign * by_scale > 1e-6 and sign * by_shift > 1e-6
        assert at()[0].abs() < 0.03 * by_scale.abs() and at()[1].abs() < 0.03 * by_shift.abs()


@solvers
@pytest.mark.parametrize("teacher", [None, Autoguidance(GAUSSIAN, WEAK)])
def test_value_and_gradient_are_those_of_the_formula_by_hand(solver, teacher):
    sample, student, zero = drawn(guidance=GUIDANCE), bent(guidance=True), torch.zeros(5).double()
    x, t, cond = sample.xt, sample.t, sample.cond
    u = (t - 1 / 4).clamp_min(0)
    v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
    y = x + broadcast_time(u - t, x) * v
    if teacher is not None and solver == "heun":
        y = x + broadcast_time(u - t, x) * (v + teacher.velocity(y, u, cond)) / 2
    value = (student(x, t, zero, cond) - student(y, u, zero, cond).detach()).square().mean()
    objective = Consistency(steps=4, grid="uniform", solver=solver)
    torch.testing.assert_close(objective(student, teacher, sample, 0).value, value)
    same(gradients(objective, student, teacher, sample), torch.autograd.grad(value, list(student.parameters())))


def test_without_a_teacher_the_neighbour_has_the_same_data_and_noise():
    """From the exact data point: with one step the neighbour is x0 itself, and f(x0, 0, 0) = x0."""
    sample, student = drawn(), bent()
    value = (student(sample.xt, sample.t, torch.zeros(5).double()) - sample.x0).square().mean()
    torch.testing.assert_close(Consistency(steps=1, grid="uniform")(student, None, sample, 0).value, value)


def test_with_many_steps_its_gradient_is_continuous_time_consistency():
    """(1 / h) times its gradient tends to 2 <f, df/dt>.

    This is sCM's gradient without the weights, at t = 1/2 and sigma_data 1 (A / d)(1 - t) A = 1/4.
    """
    half = torch.full((5,), 0.5).double()
    sample, student, n = drawn(t=half, s=0 * half), bent(), 4000
    discrete = [g * n for g in gradients(Consistency(steps=n, grid="uniform"), student, WEAK, sample)]
    continuous = gradients(SCM(sigma_data=1.0, warmup_steps=0, norm="none"), student, WEAK, sample)
    same(discrete, [g / (1 / 4) * half[0] for g in continuous], 2e-3)


def test_the_arrival_is_the_data_whatever_the_sample_says():
    student, (t, s) = bent(), draw_times()
    one, other = drawn(t=t, s=s), drawn(t=t, s=0 * s)
    assert torch.equal(Consistency()(student, WEAK, one, 0).value, Consistency()(student, WEAK, other, 0).value)


@solvers
def test_the_teacher_is_asked_at_both_ends_of_the_step_or_at_its_start(solver):
    sample, teacher = drawn(), Watched(WEAK)
    objective = Consistency(steps=4, grid="uniform", solver=solver)
    objective(bent(), teacher, sample, 0)
    x, t, cond = teacher.asked
    assert torch.equal(t, objective.earlier(sample.t) if solver == "heun" else sample.t) and cond is sample.cond
    if solver == "euler":
        assert torch.equal(x, sample.xt)


def test_float32_is_finite_at_the_ends_of_time():
    sample = drawn(t=torch.tensor([1, 1e-7, 0, 0.5, 1 - 1e-7]).double(), s=torch.zeros(5).double())
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    for grid in ("rho", "uniform"):
        value = Consistency(grid=grid)(bent().float(), WEAK, single, 0).value
        assert value.dtype == torch.float32 and bool(torch.isfinite(value))


@pytest.mark.parametrize("setting", [{"steps": 0}, {"grid": "even"}, {"solver": "rk4"}, {"sigma_min": 0.0}])
def test_a_setting_that_is_not_allowed_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Consistency(**setting)


def test_defaults_are_the_papers():
    assert OBJECTIVES["consistency"] is Consistency and not Consistency.diagonal
    assert (Consistency().steps, Consistency().grid, Consistency().solver) == (18, "rho", "heun")
