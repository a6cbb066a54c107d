"""Self-distilled maps and shortcuts: stationary at the exact map, descend to it from both sides, equal their formulas.

Off the diagonal the student is its own teacher, so the descent to the exact map is tested with `Leaning`, which is
exact on the diagonal.
"""

import pytest
import torch
from torch import nn

from flowmap.flow.derivative import DERIVATIVES
from flowmap.flow.distance import Squared
from flowmap.flow.path import Linear
from flowmap.flow.shares import evenly
from flowmap.flow.types import broadcast_time
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import ESD, LSD, OBJECTIVES, PSD, Shortcut
from flowmap.objectives.self_distilled import spread
from flowmap.recipe import read_recipe
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
    Leaning,
    Nearly,
    Watched,
    bent,
    chosen,
    drawn,
    gradients,
    pull,
    same,
    squares,
    teachers,
)
from tests.support.oracle import GAUSSIAN, draw_times, seeded

SUM = Squared(mean=False)
ALL = {
    "esd": ESD(),
    "esd, rate in the target": ESD(through_rate=False),
    "lsd": LSD(),
    "lsd, rate in the target": LSD(through_rate=False),
    "psd": PSD(),
    "psd, uniform": PSD(split="uniform"),
    "shortcut": Shortcut(finest=0, distance=SUM),
}
objectives = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
GUIDANCE = torch.linspace(1, 3, 5).double()


def mixed(shape=(5, 3, 4, 6), **cond):
    """Rows 1 and 4 on the diagonal."""
    t, s = draw_times()
    return drawn(shape, s=torch.where(torch.tensor([False, True, False, False, True]), t, s), **cond)


@objectives
@teachers
def test_still_at_the_exact_map_and_towards_it_from_both_sides(objective, teacher, shape):
    sample, accuracy = (
        drawn(shape),
        1e-4 if teacher is MIXTURE else 1e-10,
    )  # the mixture's map is integrated, and then differentiated
    assert abs(gradients(objective, Leaning(teacher), None, sample)[0]) < accuracy
    for sign in (+1, -1):
        assert sign * gradients(objective, Leaning(teacher, 0.05 * sign), None, sample)[0] > 1e-3


@objectives
def test_descent_from_either_side_returns_to_the_exact_map(objective):
    sample = drawn()
    for sign in (+1, -1):
        student, gaps = Leaning(GAUSSIAN, 0.05 * sign), [0.05]
        for _ in range(3):
            (slope,) = gradients(objective, student, None, sample)
            with torch.no_grad():
                student.lean -= 0.3 * slope / sample.xt[0].numel()
            gaps.append(sign * float(student.lean.detach()))
        assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 0.049


@objectives
def test_the_diagonal_rows_are_flow_matching_and_the_others_know_no_teacher(objective):
    """In a mixed batch the two kinds of row add up, each with its own target.

    Off the diagonal the teacher has no effect.
    """
    sample, student = mixed(guidance=GUIDANCE), bent(guidance=True)
    teacher = Watched(WEAK)
    loss = objective(student, teacher, sample, 0)
    x, t, cond = teacher.asked
    assert (
        torch.equal(x, sample.xt[[1, 4]])
        and torch.equal(t, sample.t[[1, 4]])
        and cond["guidance"].tolist() == [1.5, 3.0]
    )
    g = student.mean_velocity(x, t, t, cond) - WEAK.velocity(x, t)
    torch.testing.assert_close(loss.logs["diagonal_error"], squares(g).detach())
    alone = [objective(student, None, chosen(sample, torch.tensor([i])), 0).value for i in (0, 2, 3)]
    if objective != PSD(split="uniform"):  # whose split depends on the row
        torch.testing.assert_close(loss.value * 5, squares(g) * 2 + sum(alone))
        torch.testing.assert_close(loss.logs["self_error"] * 3, sum(alone).detach())
    still = drawn(t=draw_times()[0], s=draw_times()[0])
    velocity = (student.mean_velocity(still.xt, still.t, still.t, still.cond) - still.vt).detach()
    same(gradients(objective, student, None, still), pull(student, still, velocity))


@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE])
def test_with_a_share_on_the_diagonal_a_factor_is_led_back_as_well(teacher):
    shape = (5, 3, 4, 6) if teacher is GAUSSIAN else (5, 2)
    for objective in (ESD(), LSD(), PSD(), Shortcut()):
        for sign in (+1, -1):
            assert sign * gradients(objective, Nearly(teacher, scale=1 + 0.02 * sign), teacher, mixed(shape))[0] > 1e-3


def graded(student, sample, of):
    """F and its derivatives by central differences, with graph.

    In time, in space along the student's own velocity, and in arrival time.
    """
    x, t, s, cond, h = sample.xt, sample.t, sample.s, sample.cond, 1e-5
    ask = lambda x, t, s: student.mean_velocity(x, t, s, cond)
    own = ask(x, t, t).detach()
    move = {"t": lambda e: ask(x, t + e, s), "x": lambda e: ask(x + e * own, t, s), "s": lambda e: ask(x, t, s + e)}[of]
    return (move(h) - move(-h)) / (2 * h)


@pytest.mark.parametrize("through_rate", [True, False])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_esd_is_its_formula_by_hand(through_rate, derivative):
    sample, student = drawn(guidance=GUIDANCE), bent(guidance=True)
    x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
    in_time, in_space = graded(student, sample, "t"), graded(student, sample, "x").detach()
    rate = (in_time if through_rate else in_time.detach()) + in_space
    value = squares(
        student.mean_velocity(x, t, s, cond)
        + broadcast_time(t - s, x) * rate
        - student.mean_velocity(x, t, t, cond).detach()
    )
    objective, near = (
        ESD(through_rate=through_rate, derivative=derivative),
        1e-5 if derivative == "difference" else 1e-7,
    )
    torch.testing.assert_close(objective(student, None, sample, 0).value, value, rtol=near, atol=near)
    same(gradients(objective, student, None, sample), torch.autograd.grad(value, list(student.parameters())), near)


@pytest.mark.parametrize("through_rate", [True, False])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_lsd_is_its_formula_by_hand(through_rate, derivative):
    sample, student = drawn(guidance=GUIDANCE), bent(guidance=True)
    x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
    rate, F = graded(student, sample, "s"), student.mean_velocity(x, t, s, cond)
    own = student.mean_velocity((x - broadcast_time(t - s, x) * F).detach(), s, s, cond).detach()
    value = squares(F - broadcast_time(t - s, x) * (rate if through_rate else rate.detach()) - own)
    objective, near = (
        LSD(through_rate=through_rate, derivative=derivative),
        1e-5 if derivative == "difference" else 1e-7,
    )
    torch.testing.assert_close(objective(student, None, sample, 0).value, value, rtol=near, atol=near)
    same(gradients(objective, student, None, sample), torch.autograd.grad(value, list(student.parameters())), near)


class Normed(nn.Module):
    """A network whose last layers are torch's LayerNorm and GroupNorm."""

    def __init__(self):
        super().__init__()
        self.net, self.layer, self.group = bent((5, 4, 2, 3)), nn.LayerNorm(3).double(), nn.GroupNorm(2, 4).double()

    def mean_velocity(self, x, t, s, cond=None):
        return self.group(self.layer(self.net.mean_velocity(x, t, s)) + x)


def transformer():
    torch.manual_seed(0)
    net = DiT(preset="tiny", patch=2, width=16, depth=1, heads=2).build((1, 4, 4), num_classes=None)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)  # nothing silent
    return FlowMapNet(net).double()


@pytest.mark.parametrize(("build", "shape"), [(transformer, (5, 1, 4, 4)), (Normed, (5, 4, 2, 3))])
def test_lsd_through_norms_and_attention_is_its_formula_by_hand(build, shape):
    student, sample = build(), drawn(shape)
    x, t, s = sample.xt, sample.t, sample.s
    rate, F = graded(student, sample, "s"), student.mean_velocity(x, t, s)
    value = squares(
        F
        - broadcast_time(t - s, x) * rate
        - student.mean_velocity((x - broadcast_time(t - s, x) * F).detach(), s, s).detach()
    )
    expected = torch.autograd.grad(value, list(student.parameters()), allow_unused=True)
    got = torch.autograd.grad(LSD()(student, None, sample, 0).value, list(student.parameters()), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(1 + b.abs().max()), check_dtype=False)


@pytest.mark.parametrize("teacher", [None, WEAK])
def test_terminal_velocity_matching_is_lsd_with_half_of_its_samples_on_the_diagonal_at_the_arrival(teacher):
    """Its loss, |df/ds - u(f, s)|^2 + |u(x_s, s) - v_s|^2 for every (t, s), is twice LSD's on both kinds of row."""
    recipe, student = read_recipe("digits-tvm"), bent()
    assert isinstance(recipe.objective, LSD) and (recipe.times.diagonal, recipe.times.diagonal_at) == (0.5, "arrival")
    t, s = recipe.times(5000, generator=seeded())
    assert (t == s).sum() == 2500
    assert float(t[t == s].mean()) == pytest.approx(1 / 3, abs=0.02)  # of sorted uniform times, the earlier
    jumps = drawn()
    x, t, s, cond = jumps.xt, jumps.t, jumps.s, jumps.cond
    arrival = lambda s: x + broadcast_time(s - t, x) * student.mean_velocity(x, t, s, cond)
    h, there = 1e-5, arrival(s).detach()
    speed = (arrival(s + h) - arrival(s - h)) / (2 * h)
    ends = Linear().sample(jumps.x0, jumps.x1, s, s, cond)
    v = ends.vt if teacher is None else teacher.velocity(ends.xt, s)
    terminal = squares(speed - student.mean_velocity(there, s, s, cond).detach())
    value = terminal + squares(student.mean_velocity(ends.xt, s, s, cond) - v)
    both = {key: torch.cat([value, value]) for key, value in cond.items()}
    twice = (torch.cat([a, b]) for a, b in ((jumps.x0, jumps.x0), (jumps.x1, jumps.x1), (t, s), (s, s)))
    batch = Linear().sample(*twice, both)
    torch.testing.assert_close(2 * LSD()(student, teacher, batch, 0).value, value, rtol=1e-7, atol=1e-7)
    expected = torch.autograd.grad(value / 2, list(student.parameters()))
    same(gradients(LSD(), student, teacher, batch), expected, 1e-6)


@pytest.mark.parametrize("split", ["midpoint", "uniform"])
def test_psd_is_its_formula_by_hand(split):
    sample, student, step = drawn(guidance=GUIDANCE), bent(guidance=True), 7
    x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
    h = torch.full((5,), 0.5).double() if split == "midpoint" else spread(sample.places(step), t)
    m = t - h * (t - s)
    between = x + broadcast_time(m - t, x) * student.mean_velocity(x, t, m, cond)
    end = between + broadcast_time(s - m, x) * student.mean_velocity(between, m, s, cond)
    g = (student.mean_velocity(x, t, s, cond) - (end - x) / broadcast_time(s - t, x)).detach()
    torch.testing.assert_close(PSD(split=split)(student, None, sample, step).value.detach(), squares(g))
    same(gradients(PSD(split=split), student, None, sample, step), pull(student, sample, g))


def test_the_uniform_split_is_even_over_rows_and_steps_and_is_one_of_the_sample():
    like = torch.ones(1).double()
    draws = torch.stack([spread(torch.arange(7 * step, 7 * step + 7), like) for step in range(2000)])
    assert torch.equal(draws.flatten(), spread(torch.arange(14_000), like))  # whatever the batch
    moving = evenly(torch.arange(14_000), 0.25)  # the rows off the diagonal
    for row in (*draws.T, draws.flatten(), draws.flatten()[moving]):
        assert float((torch.histc(row, 10, 0, 1) / len(row) - 0.1).abs().max()) < 0.01


@pytest.mark.parametrize("finest", [0, 8])
def test_a_shortcut_is_two_halves_and_the_shortest_are_steps_of_the_velocity(finest):
    """With finest 8, half jumps of 1/8 and shorter take F(., t, t): rows 0 and 3."""
    t = torch.tensor([1.0, 1.0, 0.5, 0.75, 1.0]).double()
    s = torch.tensor([0.75, 0.0, 0.0, 0.625, 0.5]).double()
    sample, student = drawn(t=t, s=s, guidance=GUIDANCE), bent(guidance=True)
    x, m, cond = sample.xt, (t + s) / 2, sample.cond
    short = torch.tensor([True, False, False, True, False]) & (finest > 0)
    first = student.mean_velocity(x, t, torch.where(short, t, m), cond)
    second = student.mean_velocity(x - broadcast_time(t - m, x) * first, m, torch.where(short, m, s), cond)
    g = (student.mean_velocity(x, t, s, cond) - (first + second) / 2).detach()
    torch.testing.assert_close(Shortcut(finest=finest)(student, None, sample, 0).value.detach(), g.square().mean())
    same(gradients(Shortcut(finest=finest, distance=SUM), student, None, sample), pull(student, sample, g))


def test_the_shortest_shortcut_errs_as_euler_does():
    """At the exact map the residual of the shortest rung falls as the square of its length.

    The error of Euler's step, of order one, is length^2 / 2.
    """
    errors = []
    for finest in (32, 64):
        t = torch.full((5,), 0.5).double()
        sample = drawn(t=t, s=t - 2 / finest)
        errors.append(float(Shortcut(finest=finest)(Leaning(GAUSSIAN), None, sample, 0).value.detach()) ** 0.5)
    assert errors[0] < 0.1 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # of a mean velocity: one order less


@objectives
def test_float32_stays_float32_and_finite_at_the_ends_of_time(objective):
    sample = drawn(t=torch.tensor([1, 1, 0, 0.5, 1e-7]).double(), s=torch.tensor([0, 1, 0, 0, 0]).double())
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    value = objective(bent().float(), WEAK, single, 3).value
    assert value.dtype == torch.float32 and bool(torch.isfinite(value))


def test_under_autocast_every_weight_still_has_its_gradient():
    """The student is called first without graph, then with graph.

    The cast weights of the first call must not be cached.
    """
    student, sample = bent().float(), mixed()
    single = Linear().sample(*(value.float() for value in (sample.x0, sample.x1, sample.t, sample.s)), sample.cond)
    for objective in (*ALL.values(), OBJECTIVES["meanflow"](tangent="student")):
        student.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective(student, None, single, 0).value.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in linear_weights(student))


def linear_weights(student):
    return [layer.weight for layer in student.modules() if isinstance(layer, nn.Linear)]


SETTINGS = [(ESD, {"derivative": "x"}), (LSD, {"derivative": "x"}), (PSD, {"split": "x"}), (Shortcut, {"finest": -1})]


@pytest.mark.parametrize(("kind", "setting"), SETTINGS)
def test_a_setting_that_is_not_allowed_is_named(kind, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        kind(**setting)


def test_they_are_listed_with_the_papers_defaults():
    assert [OBJECTIVES[name] for name in ("esd", "lsd", "psd", "shortcut")] == [ESD, LSD, PSD, Shortcut]
    assert not any(OBJECTIVES[name].diagonal for name in ("esd", "lsd", "psd", "shortcut"))
    assert ESD().distance == LSD().distance == PSD().distance == SUM and ESD().through_rate and LSD().through_rate
    assert Shortcut().finest == 128 and PSD().split == "midpoint"
