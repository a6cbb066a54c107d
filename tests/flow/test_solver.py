import math

import pytest
import torch

from flowmap.flow.prior import normal_like
from flowmap.flow.solver import (
    RK4,
    SOLVERS,
    Euler,
    Heun,
    Midpoint,
    NoiseAnchored,
    heun_step,
    integrate,
    rho_times,
    uniform_times,
)
from flowmap.flow.types import broadcast_time
from tests.support.oracle import GAUSSIAN, SHAPE, draw, seeded, slope

ORDERS = {"euler": (Euler, 1, 1), "midpoint": (Midpoint, 2, 2), "heun": (Heun, 2, 2), "rk4": (RK4, 4, 4)}


def velocity(x, t):
    return GAUSSIAN.velocity(x, t)


def exact(x, start, end):
    ones = torch.ones(x.shape[0], dtype=x.dtype)
    return GAUSSIAN.flow_map(x, ones * start, ones * end)


def bent(x, t):
    """dx/dt = 2 cos(2t) (1 + x^2) conserves arctan x - sin 2t; nonlinear, so no solver exceeds its order."""
    return 2 * torch.cos(2 * broadcast_time(t, x)) * (1 + x * x)


def bent_flow(x, start, end):
    return torch.tan(torch.arctan(x) + math.sin(2 * end) - math.sin(2 * start))


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.9, 0.2)])
def test_order_of_convergence_to_a_closed_form(kind, start, end):
    solver, order, calls = ORDERS[kind]
    assert SOLVERS[kind] is solver
    x, steps = 0.3 * draw().clamp(-1, 1), (32, 64, 128)
    solutions = [solver(n)(bent, x, start=start, end=end) for n in steps]
    errors = [float((solution.x - bent_flow(x, start, end)).abs().max()) for solution in solutions]
    assert abs(slope([1 / n for n in steps], errors) - order) < 0.25, errors
    assert [solution.calls for solution in solutions] == [n * calls for n in steps]


@pytest.mark.parametrize("grid", ["uniform", "rho"])
@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
def test_convergence_to_the_exact_gaussian_flow_both_ways(kind, order, grid):
    x, steps = draw(), (100, 200, 400)
    for start, end in ((1.0, 0.0), (0.0, 1.0)):
        errors = [
            float((SOLVERS[kind](n, grid=grid)(velocity, x, start=start, end=end).x - exact(x, start, end)).abs().max())
            for n in steps
        ]
        assert abs(slope([1 / n for n in steps], errors) - order) < 0.25 and errors[-1] < {1: 0.1, 2: 1e-3}[order], (
            errors
        )


def test_inversion_undoes_sampling():
    x = draw()
    there = Heun(64)(velocity, x).x
    torch.testing.assert_close(Heun(64)(velocity, there, start=0.0, end=1.0).x, x, rtol=0, atol=1e-3)


def test_edm_grid():
    times = rho_times(18)
    sigmas = [t / (1 - t) for t in times]
    assert len(times) == 19 and times[-1] == 0 and abs(sigmas[0] - 80) < 1e-9 and abs(sigmas[-2] - 0.002) < 1e-9
    roots = torch.tensor(sigmas[:-1], dtype=torch.float64) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17))
    assert Euler(18, grid="rho").times() == (1.0, *times[1:]) and Euler(18, grid="rho").times(0.0, 1.0)[-1] == 1.0
    assert Euler(1, grid="rho").times() == (1.0, 0.0)


def test_euler_on_edms_grid_is_edms_euler():
    """x <- x + (sigma' - sigma) (x - D) / sigma from sigma_max eps; here D = (c^2 x + sigma^2 m) / (c^2 + sigma^2)."""
    m, c, eps = 0.7, 0.4, draw()
    times = rho_times(10)
    sigmas = [t / (1 - t) for t in times]
    x = sigmas[0] * eps
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        denoised = (c**2 * x + sigma**2 * m) / (c**2 + sigma**2)
        x = x + (after - sigma) * (x - denoised) / sigma
    ours = integrate(velocity, times[0] * eps, times, step=lambda v, x, t, s: x + (s - t) * v(x, t)).x
    torch.testing.assert_close(ours, x)


def test_trajectory_starts_at_x_and_ends_at_the_solution():
    x = draw()
    solution = Euler(7)(velocity, x, keep=True)
    assert solution.trajectory.shape == (8, *SHAPE)
    assert torch.equal(solution.trajectory[0], x) and torch.equal(solution.trajectory[-1], solution.x)
    assert Euler(7)(velocity, x).trajectory is None


def test_velocity_sees_its_dtype_and_times_of_the_batch():
    seen = []

    def spy(x, t):
        seen.append((x.dtype, t.dtype, t.shape, t[0].item()))
        return torch.zeros_like(x)

    out = Euler(2)(spy, draw().bfloat16()).x
    assert out.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.float32, (5,), 1.0), (torch.bfloat16, torch.float32, (5,), 0.5)]


def test_euler_last_saves_the_call_at_zero():
    solution = Heun(18, grid="rho", euler_last=True)(velocity, draw())
    assert solution.calls == 35


def test_anchored_rule_is_euler_on_straight_paths_and_the_formula_elsewhere():
    x0, x1 = draw(seed=1), draw(seed=2)

    def straight(x, t):
        return x1 - x0

    torch.testing.assert_close(NoiseAnchored(4)(straight, x1).x, x0)
    for steps in (1, 2):  # the first step starts at the anchor and the last leaves no noise: both are Euler's
        torch.testing.assert_close(NoiseAnchored(steps)(velocity, x1).x, Euler(steps)(velocity, x1).x)
    x = x1
    for t, s in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        time = torch.full((SHAPE[0],), t, dtype=torch.float64)
        x = (1 - s) * (x - broadcast_time(time, x) * velocity(x, time)) + s * x1
    solution = NoiseAnchored(4)(velocity, x1)
    torch.testing.assert_close(solution.x, x)
    assert solution.calls == 4 and not torch.allclose(x, Euler(4)(velocity, x1).x, atol=1e-2)


def test_sampling_reaches_the_data_law():
    noise = normal_like(torch.empty(20_000, 1, dtype=torch.float64), seeded())
    x0 = Heun(32)(velocity, noise).x
    assert abs(float(x0.mean()) - 0.7) < 0.02 and abs(float(x0.std()) - 0.4) < 0.01


def test_mistakes_are_named():
    x = draw()
    for make, words in [
        (lambda: Euler(0), "steps: 0 must be 1 or more"),
        (lambda: uniform_times(2.5), "steps is 2.5"),
        (lambda: Euler(grid="cosine"), "grid is 'cosine'.*uniform"),
        (lambda: Euler(4, grid="rho").times(0.8, 0.0), "rho"),
        (lambda: integrate(velocity, x, [1.0, 0.5, 0.7], step=heun_step), "strictly"),
        (lambda: integrate(velocity, x, [1.0], step=heun_step), "two or more"),
        (lambda: NoiseAnchored(4)(velocity, x, start=0.0, end=1.0), "start 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
