"""A network as a teacher: its velocity on the diagonal, frozen, and no module of whatever holds it."""

import torch
from torch import nn

from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.teachers.guidance import ClassifierFree, network_calls
from flowmap.teachers.network import NetworkTeacher
from tests.support.oracle import SHAPE, draw, draw_times


def built():
    torch.manual_seed(0)
    flow_map = FlowMapNet(MLP(width=16, depth=1).build(SHAPE[1:], num_classes=3)).double()
    nn.init.normal_(flow_map.net.conditioning.arrival.out.weight)
    return flow_map


def test_its_velocity_is_the_maps_where_arrival_is_departure():
    flow_map, x, (t, s), cond = built(), draw(), draw_times(), {"class": torch.tensor([0, 1, 2, -1, 0])}
    teacher = NetworkTeacher(flow_map)
    assert torch.equal(teacher.velocity(x, t, cond), flow_map.mean_velocity(x, t, t, cond))
    assert not torch.equal(teacher.velocity(x, t, cond), teacher.velocity(x, t))
    assert not torch.equal(teacher.velocity(x, t, cond), flow_map.mean_velocity(x, t, s, cond))


def test_it_is_frozen_and_keeps_no_graph():
    flow_map = built().train()
    teacher = NetworkTeacher(flow_map)
    v = teacher.velocity(draw().requires_grad_(), draw_times()[0])
    assert not v.requires_grad and not flow_map.training and not any(p.requires_grad for p in flow_map.parameters())


def test_what_holds_it_does_not_count_it_among_its_own():
    class Holder(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

    teacher = NetworkTeacher(built())
    holder = Holder(teacher)
    assert list(holder.parameters()) == [] and holder.state_dict() == {} and list(holder.children()) == []
    assert network_calls(teacher) == 1 and network_calls(ClassifierFree(teacher)) == 2


def test_it_moves_as_a_whole():
    teacher = NetworkTeacher(built())
    assert teacher.to(torch.float32) is teacher
    assert {p.dtype for p in teacher.flow_map.parameters()} == {torch.float32}
