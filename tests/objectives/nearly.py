"""Shared by the tests of objectives: a student near the exact map, one with no zero term, draws and gradients.

`Nearly` is the exact map with a few trained numbers; `bent()` is a small network on which every term of a formula
differs from zero.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.teachers.exact import GaussianTeacher, MixtureTeacher
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, draw_times

MIXTURE = MixtureTeacher(means=((1.0, 0.0), (-0.5, 0.8), (-0.4, -1.0)), std=(0.3, 0.5, 0.4), flow_steps=24)
WEAK = GaussianTeacher(mean=(0.2,), std=0.9)
teachers = pytest.mark.parametrize(
    ("teacher", "shape"), [(GAUSSIAN, SHAPE), (MIXTURE, (5, 2))], ids=["gaussian", "mixture"]
)


class Nearly(nn.Module):
    """The exact mean velocity, times scale, plus the shift of the row that cond names (all of them one number each)."""

    def __init__(self, teacher, scale=1.0, shift=0.0):
        super().__init__()
        self.exact = ExactStudent(teacher)
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = nn.Parameter(torch.full((5,), shift, dtype=torch.float64))

    def mean_velocity(self, x, t, s, cond):
        return self.scale * self.exact.mean_velocity(x, t, s) + broadcast_time(self.shift[cond["row"]], x)


class Leaning(nn.Module):
    """The exact mean velocity plus lean (t - s): exact on the diagonal, one number off it."""

    def __init__(self, teacher, lean=0.0):
        super().__init__()
        self.exact = ExactStudent(teacher)
        self.lean = nn.Parameter(torch.tensor(lean, dtype=torch.float64))

    def mean_velocity(self, x, t, s, cond):
        return self.exact.mean_velocity(x, t, s) + broadcast_time(self.lean * (t - s), x)


class Watched:
    """A teacher that remembers where it was asked."""

    def __init__(self, teacher):
        self.teacher = teacher

    def velocity(self, x, t, cond=None):
        assert not x.requires_grad, "a teacher never needs grad"
        self.asked = (x, t, cond)
        return self.teacher.velocity(x, t, cond)


def bent(shape=SHAPE, guidance=False, classes=None):
    """A network with nothing silent: F depends on x, t, s, guidance and class."""
    torch.manual_seed(3)
    net = MLP(width=16, depth=1).build(shape[1:], guidance=guidance, num_classes=classes)
    for layer in filter(None, (net.conditioning.arrival, net.conditioning.guidance)):
        nn.init.normal_(layer.out.weight, std=0.2)
    return FlowMapNet(net).double()


def drawn(shape=SHAPE, t=None, s=None, **cond):
    x0, x1, (later, earlier) = draw(*shape, seed=1), draw(*shape, seed=2), draw_times()
    return Linear().sample(
        x0, x1, later if t is None else t, earlier if s is None else s, {"row": torch.arange(5), **cond}
    )


def chosen(sample, rows):
    return Linear().sample(
        sample.x0[rows], sample.x1[rows], sample.t[rows], sample.s[rows], {k: v[rows] for k, v in sample.cond.items()}
    )


def gradients(objective, student, teacher, sample, step=0):
    return torch.autograd.grad(objective(student, teacher, sample, step).value, list(student.parameters()))


def pull(student, sample, weights):
    """The gradient of mean_b 2 <weights_b, F_b>: what an objective whose residual is `weights` must give."""
    F = student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond)
    return torch.autograd.grad((2 * weights * F).flatten(1).sum(1).mean(), list(student.parameters()))


def same(one, other, tolerance=1e-9):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def squares(residual):
    """The mean over samples of the sum of squares."""
    return residual.square().flatten(1).sum(1).mean()


def slopes(objective, student, teacher, sample, step=0):
    """The gradient in each number that trains, summed: one float each."""
    return [float(g.sum()) for g in gradients(objective, student, teacher, sample, step)]


def still_and_towards(objective, teacher, sample, *, accuracy, step=0, off=0.02, least=1e-3):
    """Still at the exact map; off it by a factor or a shift, to either side, the gradient points back."""
    assert max(map(abs, slopes(objective, Nearly(teacher), teacher, sample, step))) < accuracy
    for sign in (+1, -1):
        by_scale, _ = slopes(objective, Nearly(teacher, scale=1 + off * sign), teacher, sample, step)
        _, by_shift = slopes(objective, Nearly(teacher, shift=off * sign), teacher, sample, step)
        assert sign * by_scale > least and sign * by_shift > least


def exact_policy(teacher, x, t, s, num_points):
    """The velocities u_k (B, K, ...) of the policy whose data predictions are exact at the K times (flow/policy.py)."""
    found = []
    for k in range(num_points):
        tau = s + (t - s) * k / (num_points - 1)
        y = teacher.flow_map(x, t, tau)
        data = y - broadcast_time(tau, x) * teacher.velocity(y, tau)
        found.append((x - data) / broadcast_time(t, x))
    return torch.stack(found, 1)
