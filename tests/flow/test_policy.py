"""Policies: their weights by quadrature, their states by small Euler steps, the teacher's ODE as the points grow."""

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.policy import TINY, hats, mean_velocity, mixed, ratio, state, weights
from flowmap.flow.types import broadcast_time
from flowmap.nets import MLP, DiT
from flowmap.nets.flow_map import FlowMapNet, start_from
from tests.objectives.nearly import exact_policy
from tests.support.oracle import GAUSSIAN, SHAPE, draw, draw_times, slope

RATIOS = torch.tensor([TINY, 0.01, 0.4, 0.9, 0.9999], dtype=torch.float64)
each = pytest.mark.parametrize(
    "spec", [DiT(preset="nano", depth=1, points=3), MLP(width=16, points=3)], ids=["dit", "mlp"]
)


@pytest.mark.parametrize("num_points", [2, 3, 8])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_are_the_integrals_that_they_stand_for(num_points, share):
    """By the midpoint rule in log tau, in which the integrand is smooth; ratios of zero have a limit instead."""
    r = RATIOS[1:]
    at = 1 - share * (1 - r)
    found = weights(at, r, num_points)
    edges = torch.linspace(0, 1, 20_001).double()
    logs = at.log()[:, None] * (1 - edges)
    middle, width = ((logs[:, 1:] + logs[:, :-1]) / 2).exp(), logs.diff(dim=1)
    expected = torch.stack(
        [
            at[i] * (hats(middle[i], r[i].expand(20_000), num_points) * (width[i] / middle[i])[:, None]).sum(0)
            for i in range(4)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)  # the rule's error at the kinks


@pytest.mark.parametrize("num_points", [2, 5])
def test_weights_are_positive_and_their_sum_is_what_is_left_of_x(num_points):
    for share in (0.0, 0.5, 1.0):
        at = 1 - share * (1 - RATIOS)
        found = weights(at, RATIOS, num_points)
        assert bool((found >= 0).all()) and found.shape == (5, num_points)
        torch.testing.assert_close(found.sum(1), 1 - at, rtol=1e-9, atol=1e-11)
    to_data = weights(RATIOS[:1], RATIOS[:1], num_points)
    torch.testing.assert_close(to_data, torch.eye(num_points)[:1].double(), rtol=0, atol=1e-9)  # y(0) is x0(0)


def test_equal_velocities_are_the_mean_velocity_and_a_short_interval_takes_the_trapezoidal_mean():
    v, (t, s) = draw(), draw_times()
    torch.testing.assert_close(mean_velocity(v.unsqueeze(1).expand(-1, 4, -1, -1, -1), t, s), v)
    u = draw(5, 3, 4, 6)
    expected = (u[:, 0] + 2 * u[:, 1] + u[:, 2]) / 4
    for short in (0.0, 1e-9, 1e-7):
        torch.testing.assert_close(mean_velocity(u, t, t - short), expected, rtol=1e-5, atol=1e-5)
    zero = torch.zeros(5).double()
    assert bool(torch.isfinite(mean_velocity(u, zero, zero)).all()) and ratio(zero, zero).tolist() == [1 - 1e-6] * 5


def test_states_are_where_small_euler_steps_of_the_policy_lead():
    x, u, (t, s) = draw(), draw(5, 4, *SHAPE[1:], seed=3), draw_times()
    r, steps, y = ratio(s, t), 4000, draw()
    for i in range(steps):
        at = 1 - (1 - r) * i / steps
        data = x - broadcast_time(t, x) * mixed(hats(at, r, 4), u)
        y = y + broadcast_time((s - t) / steps, x) * (y - data) / broadcast_time(at * t, x)
        if i + 1 in (steps // 4, steps):
            at = 1 - (1 - r) * (i + 1) / steps
            torch.testing.assert_close(state(x, u, t, s, at), y, rtol=0, atol=5e-3)  # Euler's error
    arrival = x + broadcast_time(s - t, x) * mean_velocity(u, t, s)
    torch.testing.assert_close(state(x, u, t, s, r), arrival)


@pytest.mark.parametrize("arrival", [0.1, 0.4])
def test_the_best_policy_is_the_teachers_ode_as_its_points_grow(arrival):
    x, t, s = draw(), torch.linspace(0.5, 1, 5).double(), torch.full((5,), arrival).double()
    exact, points = GAUSSIAN.mean_velocity(x, t, s), [3, 5, 9, 17]
    error = [float((mean_velocity(exact_policy(GAUSSIAN, x, t, s, k), t, s) - exact).abs().max()) for k in points]
    assert slope([1 / (k - 1) for k in points], error) > 1.7 and error[-1] < 5e-3  # of second order
    zero = torch.zeros(5).double()  # where the last prediction of the data is the end itself
    exact, found = (GAUSSIAN.mean_velocity(x, t, zero), mean_velocity(exact_policy(GAUSSIAN, x, t, zero, 2), t, zero))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


@each
def test_a_policy_network_is_a_flow_map_whose_mean_velocity_is_that_of_its_policy(spec):
    torch.manual_seed(0)
    net = FlowMapNet(spec.build(SHAPE[1:])).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, (t, s) = draw(), draw_times()
    u = net.policy(x, t, s)
    assert u.shape == (5, 3, *SHAPE[1:]) and not torch.allclose(u[:, 0], u[:, 1])
    torch.testing.assert_close(net.mean_velocity(x, t, s), mean_velocity(u, t, s))
    assert torch.equal(net(x, t, t), x)
    for one, other in zip(
        *(eulerian_derivative(net, x, t, s, x, mode=mode) for mode in ("dual", "forward")), strict=True
    ):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-8)
    ends = net.float()(x.float(), torch.tensor([0.0, 1e-9, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert ends.dtype == torch.float32 and bool(torch.isfinite(ends).all())


@each
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_a_policy_with_a_teachers_weights_is_the_teacher(spec, prediction):
    plain = type(spec)(**{**vars(spec), "points": 1, "prediction": prediction})
    teacher = FlowMapNet(plain.build(SHAPE[1:], arrival=False))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    student = FlowMapNet(type(spec)(**{**vars(spec), "prediction": prediction}).build(SHAPE[1:]))
    start_from(student, teacher)
    x, (t, s) = draw().float(), (one.float() for one in draw_times())
    torch.testing.assert_close(student.mean_velocity(x, t, s), teacher.velocity(x, t), rtol=1e-5, atol=1e-5)
    assert teacher.net.points == 1 and student.net.leave.weight.data_ptr() != teacher.net.leave.weight.data_ptr()


def test_a_network_of_one_output_gives_no_policy():
    net = FlowMapNet(MLP(width=16).build((2,)))
    with pytest.raises(ValueError, match="student.points: must be 2 or more"):
        net.policy(torch.zeros(5, 2), torch.ones(5), torch.zeros(5))
