"""Inversion of a straight flow is exact with any number of steps; the norm of its noise; the loss by time adds up."""

import pytest

from flowmap.flow.prior import chi_square
from flowmap.flow.solver import Euler, Heun, NoiseAnchored, invert
from flowmap.metrics import Inversion, LossByTime
from flowmap.samplers import Deterministic
from tests.support.oracle import GAUSSIAN, ExactStudent, draw
from tests.support.straight import MEAN, STD, StraightStudent


def inverted(student, x0, *, solver, steps):
    """The figures of inversion by this solver and of coming back in that many steps."""
    spec = Inversion(solver=solver)
    metric = spec.build()
    for part in x0.split(3):
        x1 = invert(lambda x, t: student.mean_velocity(x, t, t), part, solver).x
        metric.update(part, x1, Deterministic()(student, x1, steps=steps))
    return spec.report(metric)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_straight_flow_inverts_exactly(steps):
    x1 = draw(50, 3, 4, 6)
    found = inverted(StraightStudent(), MEAN + STD * x1, solver=Euler(steps=steps), steps=steps)
    law = chi_square(x1.flatten(1).square().sum(1).tolist(), 72)
    assert found["inversion_error"] < 1e-24  # float64
    assert found["inversion_noise"] == pytest.approx(law["mean"] / 72) and found["inversion_z"] == pytest.approx(
        law["z"]
    )
    assert abs(found["inversion_z"]) < 4


def test_a_curved_flow_needs_steps_to_invert():
    x0 = MEAN + STD * draw(50, 3, 4, 6)
    coarse, fine = (
        inverted(ExactStudent(GAUSSIAN), x0, solver=solver, steps=1) for solver in (Euler(steps=2), Heun(steps=64))
    )
    assert fine["inversion_error"] < 1e-6 < 1e-2 < coarse["inversion_error"]
    assert abs(fine["inversion_z"]) < 4 < abs(coarse["inversion_z"])


def test_loss_by_time_is_a_mean_over_what_it_was_told():
    spec = LossByTime(times=(0.02, 0.5))
    metric, v, vt = spec.build(), draw(5, 7), draw(5, 7, seed=1)
    metric.update(1, v[:2], vt[:2])
    metric.update(1, v[2:], vt[2:])
    metric.update(0, v, v + 0.5)
    assert spec.report(metric) == {
        "loss_t0.02": pytest.approx(0.25),
        "loss_t0.5": pytest.approx(float((v - vt).square().mean())),
    }


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="solver: the anchored rule"):
        Inversion(solver=NoiseAnchored())
    for times in ((), (0.5, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="times: "):
            LossByTime(times=times)
    with pytest.raises(ValueError, match="one shape"):
        Inversion().build().update(draw(5, 2), draw(5, 2), draw(4, 2))
