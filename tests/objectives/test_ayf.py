"""Align Your Flow's objectives: stationary at the exact map, descend to it from both sides, equal their formulas.

`Nearly` is the exact map with two numbers that train; `bent()` is a small network: see nearly.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.path import Linear
from flowmap.flow.tangent.dual import DualTensor
from flowmap.flow.types import broadcast_time
from flowmap.objectives import AYFEMD, AYFLMD, OBJECTIVES, FlowMatching
from flowmap.teachers.guidance import Autoguidance
from tests.objectives.nearly import MIXTURE, WEAK, Nearly, Watched, bent, chosen, drawn, gradients, pull, same, teachers
from tests.support.oracle import GAUSSIAN, ExactStudent, draw_times

BOTH = [AYFEMD, AYFLMD]
objectives = pytest.mark.parametrize("kind", BOTH)
norms = pytest.mark.parametrize("norm", ["none", "l2", "rms"])


class Counted(nn.Module):
    """A student that records the number of rows, the number of rows with a tangent, and the guidance scales."""

    def __init__(self, student):
        super().__init__()
        self.student, self.rows, self.riding, self.guidance = student, [], [], []

    def mean_velocity(self, x, t, s, cond=None):
        self.rows.append(len(x))
        aboard = [time for time in (t, s) if type(time) is DualTensor]
        self.riding.append(len(aboard[0].tangent) if aboard else 0)
        self.guidance += [] if cond is None else cond["guidance"].tolist()
        return self.student.mean_velocity(x, t, s, cond)


def exact(kind, norm="none", **settings):
    return kind(**{"warmup_steps": 0, "r_max": 1.0, "norm": norm, **settings})


def by_hand(kind, student, teacher, sample, r):
    """The residual before normalisation, with central differences in place of derivatives."""
    x, t, s, cond, h = sample.xt, sample.t, sample.s, sample.cond, 1e-5
    with torch.no_grad():
        F, length = student.mean_velocity(x, t, s, cond), broadcast_time(t - s, x)
        if kind is AYFEMD:
            v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
            ahead, behind = (student.mean_velocity(x + e * v, t + e, s, cond) for e in (h, -h))
            return (F - v) + r * length * (ahead - behind) / (2 * h)
        ahead, behind = (student.mean_velocity(x, t, s + e, cond) for e in (h, -h))
        return F - teacher.velocity(x - length * F, s, cond) - r * length * (ahead - behind) / (2 * h)


@objectives
@teachers
@norms
def test_still_at_the_exact_map_and_towards_it_from_both_sides(kind, teacher, shape, norm):
    sample, objective = drawn(shape), exact(kind, norm)
    accuracy = 1e-5 if teacher is MIXTURE else 1e-11  # the mixture's map is integrated; c = 0.1 magnifies by 10
    assert all(g.abs().max() < accuracy for g in gradients(objective, Nearly(teacher), teacher, sample))
    for sign in (+1, -1):
        by_scale, _ = gradients(objective, Nearly(teacher, scale=1 + 0.02 * sign), teacher, sample)
        _, by_shift = gradients(objective, Nearly(teacher, shift=0.02 * sign), teacher, sample)
        assert sign * by_scale > 1e-3 and sign * by_shift.sum() > 1e-3


@objectives
@teachers
def test_descent_from_either_side_returns_to_the_exact_map(kind, teacher, shape):
    sample, objective = drawn(shape), exact(kind)
    for sign in (+1, -1):
        student, gaps = Nearly(teacher, scale=1 + 0.02 * sign), [0.02]
        for _ in range(4):
            (slope,) = torch.autograd.grad(objective(student, teacher, sample, 0).value, [student.scale])
            with torch.no_grad():
                student.scale -= 0.2 * slope / sample.xt[0].numel()
            gaps.append(sign * (float(student.scale.detach()) - 1))
        assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 0.019


def test_the_slope_in_a_scaled_map_is_the_closed_form():
    """With F = a F*: EMD's residual is (a - 1) v; LMD's is a v(f*, s) - v(f, s)."""
    sample, a = drawn(), 1.02
    x, t, s, truth = sample.xt, sample.t, sample.s, ExactStudent(GAUSSIAN)
    F = truth.mean_velocity(x, t, s)
    at_arrival = a * GAUSSIAN.velocity(truth(x, t, s), s) - GAUSSIAN.velocity(x - broadcast_time(t - s, x) * a * F, s)
    for kind, g in ((AYFEMD, (a - 1) * GAUSSIAN.velocity(x, t)), (AYFLMD, at_arrival)):
        loss = exact(kind)(Nearly(GAUSSIAN, scale=a), GAUSSIAN, sample, 0)
        torch.testing.assert_close(loss.value.detach(), g.square().flatten(1).sum(1).mean())
        got, _ = gradients(exact(kind), Nearly(GAUSSIAN, scale=a), GAUSSIAN, sample)
        torch.testing.assert_close(got, 2 * (g * F).flatten(1).sum(1).mean())


@objectives
@norms
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_value_and_gradient_are_those_of_the_formula_by_hand(kind, norm, derivative):
    sample, student, settings = (
        drawn(),
        bent(),
        dict(warmup_steps=10, r_max=0.9, norm=norm, c=0.3, derivative=derivative),
    )
    g = by_hand(kind, student, WEAK, sample, r=0.6)
    size = g.flatten(1).norm(dim=1)
    divisor = {"none": torch.ones(5).double(), "l2": size + 0.3, "rms": size / 72**0.5 + 0.3}[norm]
    normalised = g / broadcast_time(divisor, g)
    loss = kind(**settings)(student, WEAK, sample, step=6)
    near = (
        dict(rtol=1e-5, atol=1e-5) if derivative == "difference" else dict(rtol=1e-7, atol=1e-7)
    )  # a one-sided step of 1e-7
    torch.testing.assert_close(loss.value.detach(), normalised.square().flatten(1).sum(1).mean(), **near)
    torch.testing.assert_close(loss.logs["residual_norm"], size, **near)
    same(gradients(kind(**settings), student, WEAK, sample, 6), pull(student, sample, normalised), near["atol"])


def test_emd_without_a_teacher_moves_along_the_conditional_velocity_and_lmd_refuses():
    sample, student = drawn(), bent()
    g = by_hand(AYFEMD, student, None, sample, r=1)
    same(gradients(exact(AYFEMD), student, None, sample), pull(student, sample, g), 1e-7)
    with pytest.raises(ValueError, match="ayf_lmd.*teacher"):
        exact(AYFLMD)(student, None, sample, 0)


@objectives
def test_the_teacher_is_asked_once_where_the_identity_says(kind):
    sample, student, teacher = drawn(), bent(), Watched(WEAK)
    exact(kind)(student, teacher, sample, 0)
    x, t, cond = teacher.asked
    place, time = (sample.xt, sample.t) if kind is AYFEMD else (student(sample.xt, sample.t, sample.s), sample.s)
    torch.testing.assert_close(x, place.detach())
    assert torch.equal(t, time) and cond is sample.cond


@objectives
def test_the_warm_up_rises_to_r_max_and_stays(kind):
    assert [kind(warmup_steps=10, r_max=0.8).tangent_weight(n) for n in (0, 4, 8, 10, 1000)] == [0, 0.4, 0.8, 0.8, 0.8]
    assert kind(warmup_steps=0, r_max=0.8).tangent_weight(0) == 0.8
    student, sample = bent(), drawn()
    weights = [kind(warmup_steps=10, r_max=0.8)(student, WEAK, sample, n).logs["tangent_weight"] for n in (0, 4, 100)]
    torch.testing.assert_close(torch.stack(weights), torch.tensor([0, 0.4, 0.8]))
    full = gradients(exact(kind, r_max=0.8), student, WEAK, sample)
    same(gradients(exact(kind, r_max=0.8, warmup_steps=10), student, WEAK, sample, step=8), full)


def test_what_r_lacks_of_one_is_a_flow_matching_pull():
    """g(r) = r g(1) + (1 - r) g(0), and EMD's g(0) = F - v at (x, t, s)."""
    sample, student = drawn(), bent()
    none, part, all_ = (gradients(exact(AYFEMD, r_max=r), student, WEAK, sample) for r in (0.0, 0.3, 1.0))
    same(part, [0.3 * a + 0.7 * b for a, b in zip(all_, none, strict=True)])
    F = student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond)
    same(none, pull(student, sample, (F - WEAK.velocity(sample.xt, sample.t)).detach()))


def test_at_arrival_zero_emd_is_continuous_time_consistency():
    """(2 / t) <f, sg(df/dt)>, with df/dt of the student's own x -> f(x, t, 0) along v, has EMD's gradient."""
    sample, student = drawn(s=torch.zeros(5).double()), bent()
    x, t, s = sample.xt, sample.t, sample.s
    _, rate = torch.func.jvp(lambda x, t: student(x, t, s), (x, t), (WEAK.velocity(x, t), torch.ones_like(t)))
    consistency = (2 / t * (student(x, t, s) * rate.detach()).flatten(1).sum(1)).mean()
    same(gradients(exact(AYFEMD), student, WEAK, sample), torch.autograd.grad(consistency, list(student.parameters())))


@objectives
def test_on_the_diagonal_it_is_flow_matching(kind):
    """72 times its gradient: flow matching is a mean over the 72 elements, this a sum."""
    t, _ = draw_times()
    sample, student = drawn(t=t, s=t), bent()
    expected = [72 * g for g in gradients(FlowMatching(), student, WEAK, sample)]
    same(gradients(exact(kind), student, WEAK, sample), expected)


def mixed(**cond):
    """Rows 1 and 4 on the diagonal: a mask that is not its own mirror image."""
    t, s = draw_times()
    return drawn(s=torch.where(torch.tensor([False, True, False, False, True]), t, s), **cond)


@objectives
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_mixed_batch_is_its_rows_one_by_one_in_order(kind, derivative):
    sample, objective = mixed(guidance=torch.linspace(1, 3, 5).double()), exact(kind, "l2", derivative=derivative)
    student, teacher = bent(guidance=True), Autoguidance(GAUSSIAN, WEAK)
    alone = [objective(student, teacher, chosen(sample, torch.tensor([i])), 0) for i in range(5)]
    together = objective(student, teacher, sample, 0)
    torch.testing.assert_close(together.value, torch.stack([loss.value for loss in alone]).mean())
    for key in ("residual_norm", "tangent_norm"):
        torch.testing.assert_close(together.logs[key], torch.cat([loss.logs[key] for loss in alone]))
        assert together.logs[key].shape == (5,) and not together.logs[key].requires_grad
    assert (together.logs["tangent_norm"] == 0).tolist() == [False, True, False, False, True]
    rows = [gradients(objective, student, teacher, chosen(sample, torch.tensor([i]))) for i in range(5)]
    same(
        gradients(objective, student, teacher, sample), [torch.stack(g).mean(0) for g in zip(*rows, strict=True)], 1e-8
    )


@objectives
def test_a_diagonal_row_does_not_pay_for_a_derivative(kind):
    w = torch.linspace(1, 3, 5).double()
    plain, still = drawn(guidance=w), drawn(s=draw_times()[0], guidance=w)
    for sample, step, riding in ((mixed(guidance=w), 5, 3), (plain, 5, 5), (plain, 0, 0), (still, 5, 0)):
        student = Counted(bent(guidance=True))
        exact(kind, warmup_steps=10)(student, WEAK, sample, step)
        assert student.rows == [5] and student.riding == [riding]  # one forward pass, whatever the times
        assert student.guidance == ([1.0, 2.0, 2.5, 1.5, 3.0] if riding == 3 else w.tolist())


@objectives
@norms
def test_a_permutation_of_the_batch_changes_nothing(kind, norm):
    sample, order, student = mixed(), torch.tensor([3, 0, 4, 2, 1]), bent()
    shuffled = chosen(sample, order)
    a, b = (exact(kind, norm)(student, WEAK, given, 0) for given in (sample, shuffled))
    torch.testing.assert_close(a.value, b.value)
    torch.testing.assert_close(a.logs["residual_norm"][order], b.logs["residual_norm"])
    same(gradients(exact(kind, norm), student, WEAK, sample), gradients(exact(kind, norm), student, WEAK, shuffled))


@objectives
@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_samples_are_normalised_each_by_its_own_length(kind, norm):
    """A row a thousand times as wrong leaves the others' gradients as they were, and its own gradient bounded."""
    one, other = Nearly(GAUSSIAN, shift=0.02), Nearly(GAUSSIAN, shift=0.02)
    other.shift.data[2] = 20.0
    (_, small), (_, large) = (gradients(exact(kind, norm), student, GAUSSIAN, drawn()) for student in (one, other))
    rest = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(small[rest], large[rest])
    assert small[2] < large[2] <= 2 / 5 * 72 ** (0.5 if norm == "l2" else 1)


@objectives
def test_the_guidance_scale_reaches_teacher_and_student(kind):
    """On the diagonal F = w v_strong + (1 - w) v_weak leaves nothing to learn; off it, the formula by hand."""
    w, teacher = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64), Autoguidance(GAUSSIAN, WEAK)

    class Guided(nn.Module):
        factor = nn.Parameter(torch.ones(()).double())

        def mean_velocity(self, x, t, s, cond):
            scale = broadcast_time(self.factor * cond["guidance"], x)
            return scale * GAUSSIAN.velocity(x, t) + (1 - scale) * WEAK.velocity(x, t)

    t, _ = draw_times()
    student, sample = Guided(), drawn(t=t, s=t, guidance=w)
    assert exact(kind)(student, teacher, sample, 0).value < 1e-20
    assert exact(kind)(student, teacher, chosen(sample, torch.tensor([0])), 0).value < 1e-20
    other = Linear().sample(sample.x0, sample.x1, t, t, {**sample.cond, "guidance": w.flip(0)})
    assert exact(kind)(student, teacher, other, 0).value < 1e-20
    student, sample = bent(guidance=True), drawn(guidance=w)
    g = by_hand(kind, student, teacher, sample, r=1)
    same(gradients(exact(kind), student, teacher, sample), pull(student, sample, g), 1e-7)


@objectives
def test_float32_stays_float32_and_the_value_is_finite_at_the_ends_of_time(kind):
    sample = drawn(t=torch.tensor([1, 1, 0, 0.5, 1e-7]).double(), s=torch.tensor([0, 1, 0, 0, 0]).double())
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    student = bent().float()
    for derivative in DERIVATIVES:
        value = kind(warmup_steps=0, derivative=derivative)(student, WEAK, single, 0).value
        assert value.dtype == torch.float32 and bool(torch.isfinite(value))


@pytest.mark.parametrize(
    "setting",
    [{"norm": "l1"}, {"derivative": "ridden"}, {"r_max": 1.5}, {"r_max": -0.1}, {"warmup_steps": -1}, {"c": -0.1}],
)
@objectives
def test_a_setting_that_is_not_allowed_is_named(kind, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        kind(**setting)


def test_defaults_are_the_papers():
    for kind in BOTH:
        assert (kind().warmup_steps, kind().r_max, kind().c, kind().norm, kind().diagonal) == (
            10_000,
            0.99,
            0.1,
            "l2",
            False,
        )
    assert OBJECTIVES["ayf_emd"] is AYFEMD and OBJECTIVES["ayf_lmd"] is AYFLMD
