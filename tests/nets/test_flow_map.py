"""The head keeps the boundary exactly, and a student starts as its teacher: for both networks alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.flow.path import Linear
from flowmap.nets import MLP, DiT
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.objectives import AYFEMD
from tests.support.oracle import GAUSSIAN, SHAPE, draw, draw_times

SPECS = {"dit": DiT(width=24, depth=2, heads=2), "mlp": MLP(width=24, depth=2)}
nets = pytest.mark.parametrize("kind", sorted(SPECS))


def built(kind, *, arrival=True, guidance=True, seed=0, loud=False, **settings):
    """A flow map; loud: every weight drawn, so that nothing is silent."""
    torch.manual_seed(seed)
    spec = type(SPECS[kind])(
        **{
            **{k: getattr(SPECS[kind], k) for k in ("width", "depth")},
            **({"heads": 2} if kind == "dit" else {}),
            **settings,
        }
    )
    flow_map = FlowMapNet(spec.build(SHAPE[1:], num_classes=4, arrival=arrival, guidance=guidance))
    if loud:
        for p in flow_map.parameters():
            nn.init.normal_(p, std=0.3)
    return flow_map


def given(dtype=torch.float64):
    x, (t, s) = draw(dtype=dtype), draw_times(dtype=dtype)
    return x, t, s, {"class": torch.tensor([0, 3, -1, 2, 1]), "guidance": torch.linspace(1, 3, 5, dtype=dtype)}


@nets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_arrival_is_departure_nothing_moves(kind, dtype):
    flow_map = built(kind, loud=True)
    x, t, s, cond = given(torch.float32)
    flow_map, x = flow_map.to(dtype), x.to(dtype)
    assert torch.equal(flow_map(x, t, t, cond), x)
    moved = flow_map(x, t, s, cond)
    assert moved.dtype == dtype and moved.shape == x.shape and not torch.equal(moved, x)


@nets
def test_the_map_is_the_mean_velocity_times_the_interval(kind):
    flow_map = built(kind, loud=True).double()
    x, t, s, cond = given()
    F = flow_map.mean_velocity(x, t, s, cond)
    torch.testing.assert_close(flow_map(x, t, s, cond), x - (t - s).reshape(5, 1, 1, 1) * F)
    assert torch.equal(flow_map.velocity(x, t, cond), flow_map.mean_velocity(x, t, t, cond))


@nets
def test_time_arrival_class_and_guidance_all_matter_and_rows_do_not_mix(kind):
    flow_map = built(kind, loud=True).double()
    x, t, s, cond = given()
    F = flow_map.mean_velocity(x, t, s, cond)
    classes, scales = {**cond, "class": cond["class"].flip(0)}, {**cond, "guidance": cond["guidance"] + 1}
    others = [(t * 0.9 + 0.1, s, cond), (t, s / 2, cond), (t, s, classes), (t, s, scales)]
    for a, b, c in others:
        changed = (flow_map.mean_velocity(x, a, b, c) - F).flatten(1).abs().amax(1) > 1e-6
        assert changed.tolist() == ([True] * 5 if c["class"] is cond["class"] else [True, True, False, True, True])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = flow_map.mean_velocity(x[order], t[order], s[order], {k: v[order] for k, v in cond.items()})
    torch.testing.assert_close(shuffled, F[order])


@nets
def test_class_minus_one_is_no_class_and_guidance_one_is_the_default(kind):
    flow_map = built(kind, loud=True).double()
    x, t, s, cond = given()
    nobody = {"class": torch.full((5,), -1), "guidance": torch.ones(5).double()}
    assert torch.equal(flow_map(x, t, s, nobody), flow_map(x, t, s, None))
    assert not torch.equal(flow_map(x, t, s, cond), flow_map(x, t, s, None))


@nets
def test_a_student_starts_as_its_teacher_at_any_arrival_and_guidance(kind):
    teacher, student = built(kind, arrival=False, guidance=False, loud=True), built(kind, seed=1)
    assert not torch.equal(student(*given(torch.float32)), teacher(*given(torch.float32)))
    start_from(student, teacher)
    x, t, s, cond = given(torch.float32)
    v = teacher.velocity(x, t, cond)
    for arrival in (s, t, 0 * s):
        for guidance in (cond["guidance"], 7 * cond["guidance"]):
            F = student.mean_velocity(x, t, arrival, {**cond, "guidance": guidance})
            torch.testing.assert_close(F, v, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        student.net.enter.weight.add_(1)
    torch.testing.assert_close(teacher.velocity(x, t, cond), v, rtol=0, atol=0)  # a copy, not the same tensors


@nets
def test_a_student_that_started_so_learns_arrival_and_guidance(kind):
    """The silent branches' last layers have gradients at once, their first layers after one step."""
    teacher, student = built(kind, arrival=False, guidance=False, loud=True).double(), built(kind, seed=1).double()
    start_from(student, teacher)
    x, t, s, cond = given()
    student.mean_velocity(x, t, s, cond).square().sum().backward()
    for branch in (student.net.conditioning.arrival, student.net.conditioning.guidance):
        assert branch.out.weight.grad.abs().max() > 0


@nets
@pytest.mark.parametrize("settings", [{"width": 48}, {"depth": 3}, {"depth": 1}])
def test_another_architecture_is_refused_and_the_student_left_alone(kind, settings):
    teacher, student = built(kind, arrival=False, guidance=False, **settings), built(kind, seed=1)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="student: its network is not the teacher's: net"):
        start_from(student, teacher)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_another_kind_and_other_classes_are_refused():
    for teacher in (
        built("mlp", arrival=False, guidance=False),
        FlowMapNet(SPECS["dit"].build(SHAPE[1:], num_classes=9, arrival=False)),
    ):
        with pytest.raises(ValueError, match="not the teacher's"):
            start_from(built("dit"), teacher)
    with pytest.raises(ValueError, match="not the teacher's"):
        start_from(built("dit", guidance=False), built("dit"))  # the teacher's guidance branch would have no place


@nets
def test_gradient_reaches_every_parameter_after_a_few_steps(kind):
    student = built(kind).double()
    x, t, s, cond = given()
    sample = Linear().sample(x, draw(seed=2), t, s, cond)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        AYFEMD(warmup_steps=2)(student, GAUSSIAN, sample, 5).value.backward()
        optimizer.step()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert silent == []


@nets
def test_float64_runs_in_float64_throughout(kind):
    """No layer or embedding passes through float32: a shift of t by 1e-12 changes F by 1e-12 times its derivative."""
    flow_map = built(kind, loud=True).double()
    x, t, s, cond = given()
    seen = []
    for module in flow_map.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    F = flow_map.mean_velocity(x, t, s, cond)
    assert seen and set(seen) == {torch.float64}
    _, rate = eulerian_derivative(flow_map, x, t, s, torch.zeros_like(x), cond)
    moved = (flow_map.mean_velocity(x, t + 1e-9, s, cond) - F) / 1e-9
    torch.testing.assert_close(moved, rate, rtol=0, atol=1e-5 * float(rate.abs().max()))


@nets
@pytest.mark.parametrize("mode", ["dual", "forward", "difference"])
def test_every_derivative_is_richardsons(kind, mode):
    flow_map = built(kind, loud=True).double()
    for p in flow_map.parameters():
        p.data *= 0.6
    x, t, s, cond = given()
    t, s, v = 0.1 + 0.8 * t, 0.8 * s, draw(seed=5)

    def richardson(f, h=2e-4):
        central = lambda h: (f(h) - f(-h)) / (2 * h)
        return (4 * central(h / 2) - central(h)) / 3

    with torch.no_grad():
        path = richardson(lambda h: flow_map.mean_velocity(x + h * v, t + h, s, cond))
        arrival = richardson(lambda h: flow_map.mean_velocity(x, t, s + h, cond))
    near = (
        1e-5 if mode == "difference" else 1e-7
    )  # a one-sided step of 1e-7 errs by 1e-7 times half the second derivative
    for truth, (F, rate) in (
        (path, eulerian_derivative(flow_map, x, t, s, v, cond, mode=mode)),
        (arrival, lagrangian_derivative(flow_map, x, t, s, cond, mode=mode)),
    ):
        assert truth.abs().max() > 0.1
        torch.testing.assert_close(rate, truth, rtol=0, atol=near * float(truth.abs().max()))
        assert F.requires_grad and not rate.requires_grad


@nets
def test_dual_equals_forward_mode_to_rounding(kind):
    flow_map = built(kind, loud=True).double()
    (x, t, s, cond), v = given(), draw(seed=5)
    on_path = [eulerian_derivative(flow_map, x, t, s, v, cond, mode=mode)[1] for mode in ("dual", "forward")]
    at_arrival = [lagrangian_derivative(flow_map, x, t, s, cond, mode=mode)[1] for mode in ("dual", "forward")]
    for dual, reference in (on_path, at_arrival):
        torch.testing.assert_close(dual, reference, rtol=0, atol=1e-12 * float(reference.abs().max()))


@nets
def test_bf16_autocast_keeps_the_time_path_in_float32(kind):
    flow_map = built(kind, loud=True)
    x, t, s, cond = given(torch.float32)
    seen = {}
    for name in ("departure", "arrival", "guidance"):
        getattr(flow_map.net.conditioning, name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out)
        )
    entered = []
    flow_map.net.enter.register_forward_hook(lambda module, args, out: entered.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        F = flow_map.mean_velocity(x, t, s, cond)
        _, rate = eulerian_derivative(flow_map, x, t, s, draw(dtype=torch.float32, seed=5), cond)
    assert entered[0] == torch.bfloat16 and F.dtype == rate.dtype == torch.float32
    for name, value in (("departure", t), ("arrival", t - s), ("guidance", (cond["guidance"] - 1) / 4)):
        assert torch.equal(seen[name].detach() + 0, getattr(flow_map.net.conditioning, name)(value))
        assert seen[name].dtype == torch.float32
    exact = eulerian_derivative(flow_map, x, t, s, draw(dtype=torch.float32, seed=5), cond)[1]
    assert (rate - exact).norm() < 0.05 * exact.norm()  # bf16 has 8 bits


@nets
def test_it_builds_and_runs_on_the_meta_device(kind):
    with torch.device("meta"):
        flow_map = (
            built(kind) if kind == "mlp" else FlowMapNet(SPECS[kind].build(SHAPE[1:], num_classes=4, guidance=True))
        )
    assert {p.device.type for p in flow_map.parameters()} == {"meta"}
    x, t = torch.empty(SHAPE, device="meta"), torch.empty(SHAPE[0], device="meta")
    cond = {"class": torch.empty(SHAPE[0], device="meta", dtype=torch.int64), "guidance": t}
    assert flow_map(x, t, t, cond).shape == SHAPE
    real = built(kind)
    flow_map.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(flow_map(*given(torch.float32)), real(*given(torch.float32)))
