import math

import pytest
import torch
from torch.autograd.functional import jvp

from flowmap.flow.path import PATHS, PREDICTIONS, Coefficients, Linear, Trig, VariancePreserving, convert
from flowmap.flow.types import broadcast_time
from tests.support.oracle import SHAPE, draw, draw_times

ALL = [Linear(), Trig(), Trig(sigma_data=0.5), VariancePreserving()]
each_path = pytest.mark.parametrize("path", ALL, ids=str)


def test_every_kind_is_in_the_table():
    assert {type(path) for path in ALL} == set(PATHS.values())


@each_path
def test_ends_are_data_and_noise(path):
    x0, x1, ends = draw(seed=1), draw(seed=2), torch.ones(SHAPE[0], dtype=torch.float64)
    torch.testing.assert_close(path.sample(x0, x1, 0 * ends, 0 * ends).xt, x0, rtol=0, atol=0)
    at = path.coefficients(1.0)
    assert float(at.a) <= 0.0066 and float(at.b) > 0  # exactly 0 but for variance_preserving
    if not isinstance(path, VariancePreserving):
        torch.testing.assert_close(
            path.sample(x0, x1, ends, 0 * ends).xt, getattr(path, "sigma_data", 1.0) * x1, rtol=0, atol=0
        )


def test_linear_is_the_clock():
    x0, x1 = draw(seed=1), draw(seed=2)
    t, s = draw_times()
    sample = Linear().sample(x0, x1, t, s, {"class": torch.arange(5)})
    torch.testing.assert_close(sample.vt, x1 - x0, rtol=0, atol=0)
    torch.testing.assert_close(sample.xt, x0 + broadcast_time(t, x0) * (x1 - x0))
    assert sample.cond["class"].tolist() == [0, 1, 2, 3, 4]


@each_path
def test_velocity_is_the_rate_of_the_path(path):
    x0, x1 = draw(seed=1), draw(seed=2)
    t, s = draw_times()
    _, rate = jvp(lambda time: path.sample(x0, x1, time, s).xt, t, torch.ones_like(t))
    torch.testing.assert_close(path.sample(x0, x1, t, s).vt, rate)


def test_variance_preserving_keeps_the_variance_and_follows_its_beta():
    path, t = VariancePreserving(), torch.linspace(0, 1, 11, dtype=torch.float64)
    at = path.coefficients(t)
    torch.testing.assert_close(at.a**2 + at.b**2, torch.ones_like(t))
    beta = 0.1 + t * 19.9
    torch.testing.assert_close((at.a_rate / at.a)[1:], (-beta / 2)[1:])
    assert torch.isfinite(at.b_rate).all()


def truth(path, x0, x1, t, sigma_data):
    """What each kind of prediction should be, from its words rather than from rows."""
    at = path.coefficients(t)
    a, b = broadcast_time(at.a, x0), broadcast_time(at.b, x0)
    angle = torch.atan2(b, a * sigma_data)
    return {
        "x0": x0,
        "epsilon": x1,
        "velocity": path.sample(x0, x1, t, t).vt,
        "linear_velocity": x1 - x0,
        "v": a * x1 - b * x0,
        "score": -x1 / b,
        "trig": torch.cos(angle) * x1 - torch.sin(angle) * x0 / sigma_data,
    }


@each_path
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_any_prediction_gives_any_other(path, source, target):
    x0, x1, (t, s) = draw(seed=1), draw(seed=2), draw_times()
    xt = path.sample(x0, x1, t, s).xt
    known = truth(path, x0, x1, t, sigma_data=0.5)
    answer = path.convert(known[source], xt, t, source=source, target=target, sigma_data=0.5)
    torch.testing.assert_close(answer, known[target], rtol=1e-8, atol=1e-8)  # small t and VP's steep end cost digits


@pytest.mark.parametrize(
    ("source", "t"),
    [("epsilon", 0.0), ("v", 0.0), ("v", 1.0), ("x0", 1.0), ("trig", 0.0), ("trig", 1.0), ("score", 0.5)],
)
def test_linear_velocity_is_finite_wherever_it_is_determined(source, t):
    path, x0, x1 = Linear(), draw(seed=1), draw(seed=2)
    time = torch.full((SHAPE[0],), t, dtype=torch.float64)
    xt, value = path.sample(x0, x1, time, time).xt, truth(path, x0, x1, time, 0.5)[source]
    answer = path.convert(value, xt, time, source=source, target="linear_velocity", sigma_data=0.5)
    torch.testing.assert_close(answer, x1 - x0)


def test_trigflow_and_edm_forms_of_methods_section_0():
    """v = [(t - sd^2 (1-t)) / A^2] xt - (sd / A) U with EDM's U = -F."""
    x, F, (t, _), sd = draw(seed=1), draw(seed=2), draw_times(), 0.5
    A2 = t**2 + (1 - t) ** 2 * sd**2
    expected = broadcast_time((t - sd**2 * (1 - t)) / A2, x) * x + broadcast_time(sd / A2.sqrt(), x) * F
    torch.testing.assert_close(
        Linear().convert(F, x, t, source="trig", target="linear_velocity", sigma_data=sd), expected
    )
    own_x, own_t = Trig(sd).from_linear(x, t)
    torch.testing.assert_close(own_t * math.pi / 2, torch.arctan(t / ((1 - t) * sd)))
    torch.testing.assert_close(own_x, broadcast_time(sd / A2.sqrt(), x) * x)


@each_path
def test_the_linear_clock_and_back(path):
    x0, x1, (t, s) = draw(seed=1), draw(seed=2), draw_times()
    xt = path.sample(x0, x1, t, s).xt
    x_linear, t_linear = path.to_linear(xt, t)
    torch.testing.assert_close(x_linear, Linear().sample(x0, x1, t_linear, s).xt)
    x_back, t_back = path.from_linear(x_linear, t_linear)
    torch.testing.assert_close(t_back, t)
    torch.testing.assert_close(x_back, xt)


def test_linear_times_beyond_the_schedule_come_back_as_its_end():
    assert float(VariancePreserving().from_linear_time(torch.ones(1))) == 1.0
    assert float(VariancePreserving().from_linear_time(torch.zeros(1))) == 0.0


def test_bfloat16_data_keeps_float32_times():
    t = torch.tensor([0.1234567, 0.5, 0.9, 0.3, 0.7])
    sample = Linear().sample(draw().bfloat16(), draw(seed=1).bfloat16(), t, t)
    assert sample.xt.dtype == sample.vt.dtype == torch.bfloat16 and sample.t.dtype == torch.float32
    assert Linear().sample(draw(), draw(), t.bfloat16(), t.bfloat16()).t.dtype == torch.float32


def test_mistakes_are_named():
    x, t = draw(), torch.rand(SHAPE[0])
    with pytest.raises(ValueError, match="source is 'noise'.*epsilon"):
        convert(x, x, Linear().coefficients(t), source="noise", target="x0")
    with pytest.raises(ValueError, match="rates"):
        convert(x, x, Coefficients(1 - t, t), source="epsilon", target="velocity")
    with pytest.raises(ValueError, match="t must be"):
        Linear().sample(x, x, t[:3], t)
    with pytest.raises(ValueError, match="one shape"):
        Linear().sample(x, x[:, :2], t, t)
    with pytest.raises(ValueError, match="sigma_data: 0 must be above 0"):
        Trig(sigma_data=0)
    with pytest.raises(ValueError, match="beta_min: 30 must be at most beta_max"):
        VariancePreserving(beta_min=30)
