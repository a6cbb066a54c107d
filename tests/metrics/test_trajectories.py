"""Straightness is 0 on straight paths and the variance of velocity on others; the end-point error is an RMS."""

import math

import pytest
import torch

from flowmap.metrics.trajectories import EndpointScore, StraightnessScore


def straightness(x, times):
    metric = StraightnessScore()
    metric.update(x, times)
    return metric.compute().item()


def ends(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 3, 4, 6, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(
    "times", [torch.linspace(1, 0, 9), torch.tensor([1.0, 0.7, 0.2, 0.0]), torch.linspace(0.1, 0.9, 4)]
)
def test_straight_paths_score_zero(times):
    x0, x1 = ends(0)
    t = times.double().view(-1, 1, 1, 1, 1)
    assert straightness((1 - t) * x0 + t * x1, times) < 1e-12  # times are float32


def test_parabola_in_closed_form():
    """x = a t^2: the integral over t of (2 a t - a)^2 is a^2 / 3, approached with the square of the step."""
    a, times = ends(1)[0], torch.linspace(1, 0, 201, dtype=torch.float64)
    found = straightness(times.view(-1, 1, 1, 1, 1) ** 2 * a, times)
    assert found == pytest.approx(a.square().mean().item() / 3, rel=1e-4)


def test_uneven_steps_count_by_their_length():
    """A kink: velocity 3 for a quarter of the time, 1/3 for the rest; the mean velocity is 1, S = (4 + 3 * 4/9) / 4."""
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64).view(3, 1, 1).expand(3, 5, 3)
    expected = (4 + 3 * 4 / 9) / 4
    assert straightness(x, times) == pytest.approx(expected)
    assert straightness(x.flip(0), times.flip(0)) == pytest.approx(expected)


def test_scores_are_means_over_samples():
    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    x = torch.randn(5, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    metric = StraightnessScore()
    metric.update(x[:, :2], times)
    metric.update(x[:, 2:], times)
    assert metric.compute().item() == pytest.approx(straightness(x, times))


@pytest.mark.parametrize("times", [[1.0, 0.5], [1.0, 0.2, 0.5], [[1.0], [0.5], [0.0]], [1.0, 1.0, 0.0]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times must be"):
        straightness(torch.zeros(3, 5, 2), torch.tensor(times))


def test_end_point_error():
    few, many = ends(4)
    metric = EndpointScore()
    metric.update(few, few + 0.25)
    assert metric.compute().item() == pytest.approx(0.25)
    metric.reset()
    metric.update(few[:2], many[:2])
    metric.update(few[2:], many[2:])
    assert metric.compute().item() == pytest.approx(math.sqrt((few - many).square().mean().item()))
    with pytest.raises(ValueError, match="one shape"):
        metric.update(few, many[:2])
