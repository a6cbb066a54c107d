"""Two networks in series: f(x, t, t) = x, composed flow maps, a teacher's two Euler steps, saving and loading."""

from __future__ import annotations

import pytest
import torch

from flowmap.base.schema import RecipeError
from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.types import broadcast_time
from flowmap.nets import MLP, DiT, Stacked
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.lora import LoRA
from flowmap.nets.stacked import StackedNet, net_within, stack_of
from flowmap.recipe import read_recipe
from flowmap.recipe.settings import FromTeacher
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student, save_student
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, draw_times

pytest.importorskip("datasets")


PERCEPTRON = MLP(width=16, depth=1)


def shaken(net, seed=0):
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return FlowMapNet(net.double())


def built(spec=PERCEPTRON, **more):
    return shaken(Stacked(spec).build(SHAPE[1:], **more))


def test_it_is_the_composition_of_two_flow_maps_by_way_of_the_middle():
    stack, (t, s), x = built(), draw_times(), draw()
    middle = (t + s) / 2
    first, second = (FlowMapNet(part) for part in stack.net.parts)
    torch.testing.assert_close(stack(x, t, s), second(first(x, t, middle), middle, s))
    assert not torch.allclose(first(x, t, s), second(x, t, s))


def test_nothing_moves_where_arrival_is_departure():
    stack, (t, _), x = built(), draw_times(), draw()
    assert torch.equal(stack(x, t, t), x)
    first, second = stack.net.parts
    torch.testing.assert_close(stack.mean_velocity(x, t, t), (first(x, t, t) + second(x, t, t)) / 2)


def test_two_exact_maps_are_the_exact_map():
    class Exact(torch.nn.Module):
        def forward(self, x, t, s, cond=None):
            return ExactStudent(GAUSSIAN).mean_velocity(x, t, s)

    stack, (t, s), x = FlowMapNet(StackedNet(Exact(), Exact())), draw_times(), draw()
    torch.testing.assert_close(stack(x, t, s), GAUSSIAN.flow_map(x, t, s))


@pytest.mark.parametrize("arrival", [True, False])
def test_started_from_a_teacher_it_takes_two_of_its_euler_steps(arrival):
    teacher = shaken(MLP(width=16, depth=1).build(SHAPE[1:], arrival=False, num_classes=3), seed=4)
    stack = FlowMapNet(
        Stacked(MLP(width=16, depth=1)).build(SHAPE[1:], arrival=arrival, guidance=True, num_classes=3).double()
    )
    start_from(stack, teacher)
    (t, s), x, cond = draw_times(), draw(), {"class": torch.tensor([0, 1, 2, -1, 1])}
    assert torch.equal(stack.mean_velocity(x, t, t, cond), teacher.velocity(x, t, cond)), (
        "on the diagonal it is the teacher, to the bit"
    )
    middle = (t + s) / 2
    y = x + broadcast_time(middle - t, x) * teacher.velocity(x, t, cond)
    torch.testing.assert_close(
        stack(x, t, s, cond), y + broadcast_time(s - middle, x) * teacher.velocity(y, middle, cond)
    )
    first, second = stack.net.parts
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first.parameters(), second.parameters(), strict=True)), (
        "weights of their own"
    )


def test_a_start_that_does_not_fit_is_refused():
    stack = FlowMapNet(Stacked(MLP(width=16, depth=1)).build((2,)))
    with pytest.raises(ValueError, match="its network is not the teacher's"):
        start_from(stack, FlowMapNet(MLP(width=8, depth=1).build((2,), arrival=False)))
    again = FlowMapNet(Stacked(MLP(width=16, depth=1)).build((2,)))
    start_from(again, stack)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stack.parameters(), strict=True))


@pytest.mark.parametrize("spec", [MLP(width=16, depth=1), DiT(preset="nano", patch=2)], ids=["mlp", "dit"])
def test_the_tangent_rides_through_both(spec):
    stack = built(spec)
    (t, s), x, v = draw_times(), draw(), draw(seed=3)
    ridden, forward = (eulerian_derivative(stack, x, t, s, v, None, mode=mode) for mode in ("dual", "forward"))
    for one, other in zip(ridden, forward, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = StudentConfig(
        Stacked(DiT(preset="nano", patch=2)), Deterministic(), (1, 8, 8), num_classes=10, guidance=(1.0, 3.0, 1.5)
    )
    flow_map = shaken(config.build().net).float()
    save_student(tmp_path, config, flow_map.state_dict(), recipe="", card="")
    student = load_student(tmp_path)
    assert student.config == config
    x, (t, s) = draw(5, 1, 8, 8, dtype=torch.float32), draw_times(dtype=torch.float32)
    assert torch.equal(student.flow_map(x, t, s), flow_map(x, t, s))


def test_what_cannot_be_stacked():
    with pytest.raises(ValueError, match="net: a stack has two networks"):
        Stacked(Stacked(MLP()))
    with pytest.raises(ValueError, match="net.lora: a stack trains all of its weights"):
        Stacked(FromTeacher(LoRA()))
    with pytest.raises(RecipeError, match="student.net.kind: no 'stacked'"):
        read_recipe("digits", ["student={kind: stacked, net: {kind: stacked, net: {kind: mlp}}}"])
    assert net_within(Stacked(MLP())) == MLP() == net_within(MLP()) and stack_of(MLP)(width=3) == Stacked(MLP(width=3))


def test_the_conditions_of_an_empty_text_reach_both_and_plain_networks_have_none():
    diffusers = pytest.importorskip("diffusers")
    from flowmap.nets.diffusers_model import DiffusersNet, clock_of
    from tests.support import tiny_nets

    parts = [
        DiffusersNet(tiny_nets.sd(), *clock_of(diffusers.DDIMScheduler()), arrival=True, guidance=False)
        for _ in range(2)
    ]
    stack = StackedNet(*parts)
    stack.empty = {"text": torch.zeros(1, 3, 32)}
    assert all("text" in part.empty for part in parts)
    x, one = draw(2, 4, 8, 8, dtype=torch.float32), torch.ones(2)
    assert stack(x, one, 0 * one).shape == x.shape
    plain = StackedNet(*(MLP(width=8, depth=1).build((2,)) for _ in range(2)))
    assert not hasattr(plain, "empty") and not hasattr(plain, "activation_checkpointing")
