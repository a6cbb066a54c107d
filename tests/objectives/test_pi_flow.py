"""pi-Flow: still at the best policy, towards it from both sides, its formula by hand, training to a closed form."""

import pytest
import torch
from torch import nn

from flowmap.flow.distance import Squared
from flowmap.flow.path import Linear
from flowmap.flow.policy import hats, mixed, ratio, state
from flowmap.flow.types import broadcast_time
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import OBJECTIVES, PiFlow
from flowmap.objectives.pi_flow import LEAST
from flowmap.teachers.exact import GaussianTeacher
from tests.objectives.nearly import MIXTURE, Watched, drawn, exact_policy, gradients
from tests.support.oracle import GAUSSIAN, draw, slope

POINT = GaussianTeacher(mean=(0.7,), std=1e-9)  # straight paths, on which a policy of two points is exact
SUM = Squared(mean=False)
SUMMED = PiFlow(distance=SUM)


class Policy(nn.Module):
    """The best policy of the teacher's, its velocities times scale plus shift."""

    def __init__(self, teacher, num_points=4, scale=1.0, shift=0.0):
        super().__init__()
        self.teacher, self.num_points = teacher, num_points
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def policy(self, x, t, s, cond=None):
        return self.scale * exact_policy(self.teacher, x, t, s, self.num_points) + self.shift


def slopes(teacher, sample, num_points=4, scale=1.0, shift=0.0, objective=SUMMED):
    student = Policy(teacher, num_points, scale, shift)
    return [float(g) for g in gradients(objective, student, teacher, sample)]


@pytest.mark.parametrize("num_points", [2, 5])
@pytest.mark.parametrize("states", [1, 3])
def test_where_paths_are_straight_it_is_still_at_the_teacher_and_leads_to_it(num_points, states):
    objective = PiFlow(states=states, distance=SUM)
    of = lambda **off: slopes(POINT, drawn(), num_points, objective=objective, **off)
    assert of() == pytest.approx([0, 0], abs=1e-5)  # of 1e-9 of spread, over small times
    for sign in (1, -1):
        assert sign * of(scale=1 + 0.02 * sign)[0] > 1e-2 and sign * of(shift=0.02 * sign)[1] > 1e-2


@pytest.mark.parametrize(
    ("teacher", "shape"), [(GAUSSIAN, (5, 3, 4, 6)), (MIXTURE, (5, 2))], ids=["gaussian", "mixture"]
)
def test_elsewhere_it_is_still_as_the_points_grow_and_leads_to_the_teacher(teacher, shape):
    t = torch.linspace(0.5, 1, 5).double()
    sample, points = drawn(shape, t=t, s=t - 0.4), [5, 9, 17]
    still = [max(map(abs, slopes(teacher, sample, k))) for k in points]
    off = [slopes(teacher, sample, 17, scale=1 + 0.05 * sign)[0] for sign in (1, -1)]
    assert still[-1] < 0.1 * min(off[0], -off[1])
    errors = [float(PiFlow(distance=SUM)(Policy(teacher, k), teacher, sample, 0).value.detach()) ** 0.5 for k in points]
    assert slope([1 / (k - 1) for k in points], errors) > 1.5  # an interpolation is of second order between its points
    for sign in (1, -1):
        assert sign * slopes(teacher, sample, 17, shift=0.05 * sign)[1] > 1e-2


@pytest.mark.parametrize("states", [1, 2])
def test_value_and_gradient_are_those_of_the_formula_by_hand(states):
    """At tau_i = t - ((places phi + 1/2 + i / states) mod 1) (t - s)."""
    sample, student = drawn(), Policy(GAUSSIAN, 3, 1.1, 0.2)
    x, t, s = sample.xt, sample.t, sample.s
    first = (sample.places(7).double() * 0.6180339887498949 + 0.5) % 1
    total = 0.0
    for i in range(states):
        share = (first + i / states) % 1
        tau = torch.maximum(t - share * (t - s), t.clamp_max(LEAST))
        u, at = student.policy(x, t, s), tau / t
        y = state(x, u, t, s, at).detach()
        data = x - broadcast_time(t, x) * mixed(hats(at, ratio(s, t), 3), u)
        error = (y - data) / broadcast_time(tau, x) - GAUSSIAN.velocity(y, tau)
        total = total + error.square().flatten(1).sum(1).mean() / states
    loss = PiFlow(states=states, distance=SUM)(student, GAUSSIAN, sample, 7).value
    torch.testing.assert_close(loss, total)
    by_hand = torch.autograd.grad(total, list(student.parameters()))
    for a, b in zip(torch.autograd.grad(loss, list(student.parameters())), by_hand, strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_is_asked_at_the_states_with_the_condition_and_gets_no_gradient():
    sample, teacher = drawn(), Watched(GAUSSIAN)
    student = Policy(GAUSSIAN, 3, 0.9)
    PiFlow(states=1)(student, teacher, sample, 0).value.backward()
    y, tau, cond = teacher.asked
    assert cond is sample.cond and bool(((tau <= sample.t) & (tau >= sample.s)).all())
    expected = state(
        sample.xt, student.policy(sample.xt, sample.t, sample.s).detach(), sample.t, sample.s, tau / sample.t
    )
    torch.testing.assert_close(y, expected)


def test_the_states_of_a_run_are_spread_over_the_interval():
    rows, teacher = 500, Watched(GAUSSIAN)
    t, s = torch.ones(rows).double(), torch.zeros(rows).double()
    sample = Linear().sample(draw(rows, 1), draw(rows, 1, seed=2), t, s, None)
    PiFlow(states=1)(Policy(GaussianTeacher(mean=(0.7,), std=0.4), 2), teacher, sample, 0)
    tau = teacher.asked[1].sort().values
    assert float(tau[0]) >= LEAST and float((tau[5:] - torch.linspace(0, 1, rows)[5:]).abs().max()) < 0.01


def test_training_reaches_the_closed_form_of_a_gaussian():
    teacher = GaussianTeacher(mean=(0.7,), std=0.4)
    torch.manual_seed(0)
    student = FlowMapNet(MLP(width=64, depth=2, points=4).build((2,)))
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 500)
        t, s = torch.rand(2, 256).sort(dim=0, descending=True).values
        t, s = torch.where(torch.rand(256) < 0.3, 1.0, t), torch.where(torch.rand(256) < 0.3, 0.0, s)
        sample = Linear().sample(0.7 + 0.4 * torch.randn(256, 2), torch.randn(256, 2), t, s, None)
        optimizer.zero_grad()
        PiFlow()(student, teacher, sample, step).value.backward()
        optimizer.step()
    x = draw(2000, 2).float()
    for t, s in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0)):
        t, s = torch.full((2000,), t), torch.full((2000,), s)
        at = teacher.flow_map(x, torch.ones(2000), t)
        with torch.no_grad():
            error = (student(at, t, s) - teacher.flow_map(at, t, s)).square().mean().sqrt()
        assert float(error) < 0.2  # 0.8 for one step without training


def test_float32_stays_float32_and_finite_at_the_ends_of_time():
    t, s = torch.tensor([1, 1, 0, 0.5, 1e-7]), torch.tensor([0, 1, 0, 0, 0])
    sample = Linear().sample(draw(5, 2).float(), draw(5, 2, seed=2).float(), t, s.float(), None)
    student = FlowMapNet(MLP(width=16, points=3).build((2,)))
    value = PiFlow()(student, GaussianTeacher(mean=(0.7,), std=0.4), sample, 0).value
    value.backward()
    assert value.dtype == torch.float32 and bool(torch.isfinite(value))
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_mistakes_are_named():
    assert OBJECTIVES["pi_flow"] is PiFlow and PiFlow().derivative is None and not PiFlow().diagonal
    with pytest.raises(ValueError, match="add a teacher"):
        PiFlow()(Policy(GAUSSIAN), None, drawn(), 0)
    with pytest.raises(ValueError, match="states"):
        PiFlow(states=0)
    with pytest.raises(ValueError, match="student.points"):
        PiFlow()(FlowMapNet(MLP(width=16).build((3, 4, 6))), GAUSSIAN, drawn(), 0)
