"""The learned weight: minimal where u is the logarithm of the error; it only scales the gradient of the map.

The exact map stays stationary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.types import rows_of
from flowmap.nets.uncertainty import Uncertainty, with_uncertainty
from flowmap.objectives import AYFEMD, AYFLMD, ESD, LSD, PSD, SCM, FlowMatching, Shortcut
from flowmap.objectives.uncertainty import EvenWeight, LearnedWeight, PowerWeight
from tests.objectives.nearly import MIXTURE, WEAK, Nearly, bent, drawn, still_and_towards, teachers
from tests.support.oracle import draw, draw_times

LEARNED = LearnedWeight()
SELF = {"esd": ESD, "lsd": LSD, "psd": PSD, "shortcut": Shortcut}
ALL = {"scm": lambda **settings: SCM(warmup_steps=0, **settings), **SELF}
SLOW = ("esd", "lsd")
every = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, kind in ALL.items()]
)


class Table(nn.Module):
    """u by t < 1/2 or not."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def log_error(self, t, s):
        return self.u[(t >= 0.5).long()]


def test_where_u_is_least_it_is_the_logarithm_of_the_mean_error():
    """Errors about .01 at early times and 7 at late ones, both scattered."""
    t, table = torch.linspace(0, 0.99, 40, dtype=torch.float64), Table()
    error = torch.where(t < 0.5, 0.01, 7.0) * draw(40, seed=3).exp()
    optimizer = torch.optim.LBFGS([table.u], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = LEARNED(error, table, t, 0 * t).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = torch.stack([error[:20].mean().log(), error[20:].mean().log()])
    torch.testing.assert_close(table.u.detach(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        LEARNED(error, table, t, 0 * t).mean().detach(), (1 + wanted).mean(), rtol=1e-6, atol=1e-6
    )


def unsure(seed=5):
    """bent() with a branch whose u depends on both times."""
    student = with_uncertainty(bent(), 0)
    torch.manual_seed(seed)
    nn.init.normal_(student.uncertainty.leave.weight, std=0.5)
    return student.double()


def split(student):
    net = [p for name, p in student.named_parameters() if not name.startswith("uncertainty.")]
    return net, list(student.uncertainty.parameters())


@every
def test_the_maps_gradient_keeps_its_direction_at_each_pair_of_times(kind):
    """Row by row: the gradient of the error over exp(u) at the row's own times.

    u descends to the logarithm of the error.
    """
    student, sample = unsure(), drawn()
    net, branch = split(student)
    for row in range(5):
        one = rows_of(sample, torch.tensor([row]))
        plain, weighted = kind()(student, WEAK, one, 3), kind(weight=LEARNED)(student, WEAK, one, 3)
        u = student.log_error(one.t, torch.zeros_like(one.s) if kind is ALL["scm"] else one.s)
        torch.testing.assert_close(weighted.value, ((-u).exp() * plain.value + u).squeeze())
        wanted = torch.autograd.grad(plain.value, net, retain_graph=True)
        found = torch.autograd.grad(weighted.value, net, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, (-u.detach()).exp() * b, rtol=1e-9, atol=1e-12)
        moved = torch.autograd.grad(weighted.value, branch, retain_graph=True)
        by_u = torch.autograd.grad(u.sum(), branch)
        slope = (1 - (-u).exp() * plain.value).detach()
        for a, b in zip(moved, by_u, strict=True):
            torch.testing.assert_close(a, slope * b, rtol=1e-9, atol=1e-12)
        assert abs(float(slope)) > 1e-3


@every
def test_the_mean_is_over_rows_each_with_its_own_weight(kind):
    student, sample = unsure(), drawn()
    objective = kind(weight=LEARNED)
    alone = [objective(student, WEAK, rows_of(sample, torch.tensor([i])), 3).value for i in range(5)]
    torch.testing.assert_close(objective(student, WEAK, sample, 3).value, torch.stack(alone).mean())


@teachers
@every
def test_still_at_the_exact_map_and_towards_it_from_both_sides(kind, teacher, shape, monkeypatch):
    monkeypatch.setattr(Nearly, "log_error", lambda self, t, s: 0.4 - t + 2 * s, raising=False)
    t, s = draw_times()
    scm = kind is ALL["scm"]
    sample = drawn(shape, t=t / 2, s=0 * s) if scm else drawn(shape, t=t, s=s)
    settings = {"norm": "none"} if scm else {}
    if not scm:  # one row on the diagonal, as they train; the law of a factor is that row's
        sample = drawn(shape, t=t, s=torch.where(torch.arange(5) == 0, t, s))
    accuracy = 1e-5 if teacher is MIXTURE else 1e-9  # the mixture's map is integrated
    still_and_towards(kind(weight=LEARNED, **settings), teacher, sample, accuracy=accuracy, least=1e-5)


def test_the_branch_is_zero_at_the_start_and_knows_both_times():
    branch, (t, s) = Uncertainty(), draw_times(dtype=torch.float32)
    assert torch.equal(branch(t, s), torch.zeros(5))
    nn.init.normal_(branch.leave.weight)
    u = branch(t, s)
    assert u.shape == (5,) and bool(
        ((branch(t, s / 2) - u).abs() > 1e-4).all() and ((branch((t + 1) / 2, s) - u).abs() > 1e-4).all()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(branch(t, s), u), "in float32 under autocast"


def test_who_learns_a_weight():
    assert SCM(weight=LEARNED).learns_weight and PSD(weight=LEARNED).learns_weight
    assert not any(one.learns_weight for one in (SCM(), LSD(), AYFEMD(), FlowMatching(), Shortcut()))
    error = draw(5).square()
    assert EvenWeight()(error, None, error, error) is error
    assert math.isclose(float(LEARNED(torch.ones(1), with_uncertainty(bent(), 0), torch.rand(1), torch.zeros(1))), 1.0)


class Predicts:
    """A flow map whose mean velocity is that of a predicted datum, or of predicted noise, `out` (B, D)."""

    def __init__(self, out: torch.Tensor, noise: bool):
        self.out, self.noise = out.requires_grad_(), noise

    def mean_velocity(self, x, t, s, cond=None):
        t = t[:, None]
        return (self.out - x) / (1 - t) if self.noise else (x - self.out) / t


@pytest.mark.parametrize("noise, weight", [(False, PowerWeight()), (True, PowerWeight(noise=0, data=1))])
@pytest.mark.parametrize("objective", [AYFEMD, AYFLMD])
def test_a_power_weighs_the_outputs_of_a_network_alike_at_all_times(objective, noise, weight):
    t = torch.tensor([0.03, 0.3, 0.6, 0.97], dtype=torch.float64)
    x0, x1 = draw(4, 3), draw(4, 3)
    sample = Linear().sample(x0, x1, t, t / 2)
    teacher = SimpleNamespace(velocity=lambda x, t, cond=None: 0.3 * x + t[:, None])
    sizes = []
    for one in (EvenWeight(), weight):
        student = Predicts(draw(4, 3), noise)
        objective(warmup_steps=0, c=0.0, weight=one)(student, teacher, sample, 1).value.backward()
        sizes.append(student.out.grad.norm(dim=1))
    assert sizes[0].max() > 10 * sizes[0].min()
    torch.testing.assert_close(sizes[1], torch.full_like(t, 2 / 4))


def test_a_power_of_zero_is_no_weight_and_its_exponents_are_checked():
    error, t = draw(5).square(), torch.rand(5)
    assert torch.equal(PowerWeight(noise=0)(error, None, t, t), error)
    assert torch.allclose(PowerWeight(noise=2, data=0.5)(error, None, t, t), error * t**2 * (1 - t) ** 0.5)
    with pytest.raises(ValueError, match="noise"):
        PowerWeight(noise=-1)
