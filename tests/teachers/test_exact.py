import dataclasses

import pytest
import torch
from torch.autograd.functional import jvp

from flowmap.flow.types import broadcast_time
from flowmap.teachers.exact import GaussianTeacher, MixtureTeacher
from tests.support.oracle import GAUSSIAN, RING, ExactStudent, draw, draw_times, seeded, slope

WIDE = GaussianTeacher(mean=(1.0, -2.0, 0.5), std=1.7)


def both():
    return [(GAUSSIAN, draw()), (WIDE, draw(5, 3)), (RING, draw(5, 2))]


@pytest.mark.parametrize(("teacher", "x"), both(), ids=["gaussian", "wide", "ring"])
def test_velocity_is_the_regression_of_noise_minus_data(teacher, x):
    """E[(x1 - x0) | xt] by importance over many draws of x0: xt = x fixes x1 = (x - (1-t) x0) / t."""
    x, time = x[:1].flatten(1)[:, : 2 if teacher is RING else 3][:1] * 0.5, torch.tensor([0.6], dtype=torch.float64)
    teacher = dataclasses.replace(teacher, shape=(x.shape[1],)) if isinstance(teacher, GaussianTeacher) else teacher
    x0 = teacher.sample(400_000, seeded()).double()
    x1 = (x - (1 - 0.6) * x0) / 0.6
    weight = torch.softmax(-(x1**2).sum(1) / 2, 0)[:, None]
    expected = (weight * (x1 - x0)).sum(0)
    error = ((weight * (x1 - x0 - expected)) ** 2).sum(0).sqrt()
    assert ((teacher.velocity(x, time)[0] - expected).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize(("teacher", "x"), both(), ids=["gaussian", "wide", "ring"])
def test_map_is_identity_then_moves_with_the_velocity_and_composes(teacher, x):
    t, s = draw_times()
    f = lambda a, b: teacher.flow_map(x, a, b)
    torch.testing.assert_close(f(t, t), x)
    _, rate = jvp(lambda arrival: teacher.flow_map(x, t, arrival), s, torch.ones_like(s))
    accuracy = 1e-6 if teacher is RING else 1e-10  # the ring's map is integrated
    torch.testing.assert_close(rate, teacher.velocity(f(t, s), s), rtol=0, atol=10 * accuracy)
    middle = (t + s) / 2
    torch.testing.assert_close(teacher.flow_map(f(t, middle), middle, s), f(t, s), rtol=0, atol=accuracy)
    torch.testing.assert_close(teacher.flow_map(f(t, s), s, t), x, rtol=0, atol=10 * accuracy)


def test_eulerian_identity_of_the_gaussian():
    """F = v - (t - s) dF/dt along v."""
    x, (t, s) = draw(), draw_times()
    v = GAUSSIAN.velocity(x, t)
    F, rate = jvp(lambda a, b: GAUSSIAN.mean_velocity(a, b, s), (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(F, v - broadcast_time(t - s, x) * rate)
    torch.testing.assert_close(ExactStudent(GAUSSIAN)(x, t, s), GAUSSIAN.flow_map(x, t, s))


def test_pure_noise_becomes_the_data_law():
    ones = torch.ones(20_000, dtype=torch.float64)
    noise = draw(20_000, 3)
    x0 = WIDE.flow_map(noise, ones, 0 * ones)
    torch.testing.assert_close(x0, torch.tensor([1.0, -2.0, 0.5]).double() + 1.7 * noise)
    drawn = WIDE.sample(20_000, seeded(1))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, -2.0, 0.5]), rtol=0, atol=0.06)
    assert drawn.shape == (20_000, 3) and abs(float(drawn[:, 0].std()) - 1.7) < 0.04
    assert GAUSSIAN.sample(2, seeded()).shape == (2, 3, 4, 6)


def test_noise_becomes_the_ring_with_its_weights():
    teacher, n = dataclasses.replace(RING, flow_steps=32), 10_000
    ones = torch.ones(n, dtype=torch.float64)
    means = torch.tensor(RING.means, dtype=torch.float64)
    shares = torch.tensor(RING.weights) / sum(RING.weights)
    for x0 in (teacher.flow_map(draw(n, 2), ones, 0 * ones), teacher.sample(n, seeded(1)).double()):
        distance, nearest = torch.cdist(x0, means).min(1)
        assert abs(float((distance**2).mean() / 2) ** 0.5 - 0.1) < 0.003
        torch.testing.assert_close(torch.bincount(nearest, minlength=8) / n, shares, rtol=0, atol=0.02)


def test_a_mixture_of_one_is_the_gaussian():
    one, gaussian = MixtureTeacher(means=((1.0, -2.0, 0.5),), std=(1.7,)), WIDE
    x, (t, s) = draw(5, 3), draw_times()
    torch.testing.assert_close(one.velocity(x, t), gaussian.velocity(x, t))
    torch.testing.assert_close(one.flow_map(x, t, s), gaussian.flow_map(x, t, s))


def test_components_of_different_std():
    """Two components with one mean: the posterior weight must know the volume of each."""
    teacher = MixtureTeacher(means=((0.0, 0.0), (0.0, 0.0)), std=(0.1, 2.0), weights=(0.3, 0.7))
    x, time = torch.tensor([[0.4, -0.1]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    stds = torch.tensor([0.1, 2.0]).double()
    S2 = 0.25 * stds**2 + 0.25
    prior = torch.tensor([0.3, 0.7]).double() / S2 * torch.exp(-(x**2).sum() / (2 * S2))
    slopes = (0.5 - stds**2 * 0.5) / S2
    torch.testing.assert_close(teacher.velocity(x, time), (prior / prior.sum() * slopes).sum() * x)


def test_map_of_the_ring_converges_with_order_four_and_meets_its_stated_accuracy():
    x, ones = draw(37, 2, seed=3), torch.ones(37, dtype=torch.float64)
    with_steps = lambda n: dataclasses.replace(RING, flow_steps=n).flow_map(x, ones, 0 * ones)
    truth, steps = with_steps(1024), (64, 128, 256)
    errors = [float((with_steps(n) - truth).abs().max()) for n in steps]
    assert abs(slope([1 / n for n in steps], errors) - 4) < 0.5, errors
    assert errors[-1] < 1e-6


def test_class_picks_a_component():
    x, (t, _) = draw(5, 2), draw_times()
    cond = {"class": torch.tensor([3, -1, 0, 7, -1])}
    v = RING.velocity(x, t, cond)
    for row, component in enumerate(cond["class"].tolist()):
        alone = RING if component < 0 else GaussianTeacher(mean=RING.means[component], std=0.1)
        torch.testing.assert_close(v[row : row + 1], alone.velocity(x[row : row + 1], t[row : row + 1]))
    drawn = RING.sample(5, seeded(), {"class": torch.tensor([3, 3, 0, 7, 5])})
    assert torch.cdist(drawn, torch.tensor(RING.means)).argmin(1).tolist() == [3, 3, 0, 7, 5]
    with pytest.raises(ValueError, match="class is 8"):
        RING.velocity(x, t, {"class": torch.tensor([8, 0, 0, 0, 0])})


@pytest.mark.parametrize("teacher", [GAUSSIAN, RING], ids=["gaussian", "ring"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_is_finite_at_the_ends(teacher, t):
    x = 3 * draw(5, 2, dtype=torch.float32)
    v = teacher.velocity(x, torch.full((5,), t))
    assert torch.isfinite(v).all() and v.dtype == torch.float32


def test_ends_of_the_velocity():
    x, mean = draw(5, 2), (torch.tensor(RING.weights).double() @ torch.tensor(RING.means).double()) / 12
    torch.testing.assert_close(RING.velocity(x, torch.ones(5).double()), x - mean)
    at_data = WIDE.velocity(draw(5, 3), torch.zeros(5).double())
    torch.testing.assert_close(at_data, -draw(5, 3))  # v = -x0 + E[x1] = -x0


def test_mistakes_are_named():
    for make, words in [
        (lambda: GaussianTeacher(std=0), "std is 0"),
        (lambda: GaussianTeacher(mean=(1.0, 2.0), shape=(3,)), "mean has 2 numbers"),
        (lambda: MixtureTeacher(means=()), "means is"),
        (lambda: MixtureTeacher(means=((0.0,), (1.0, 2.0))), "means is"),
        (lambda: MixtureTeacher(means=((0.0,), (1.0,)), std=(1.0, 1.0, 1.0)), "std has 3"),
        (lambda: MixtureTeacher(means=((0.0,), (1.0,)), weights=(1.0, 0.0)), "weights is"),
        (lambda: MixtureTeacher(means=((0.0,),), flow_steps=0), "flow_steps is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
