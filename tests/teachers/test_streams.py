"""Autoguidance on two CUDA streams: the order of waits, and which calls use one stream. No device is needed."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmap.flow.tangent.compiled import Compiled, inductor_with_cuda_graphs
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.teachers import guidance, streams
from flowmap.teachers.exact import GaussianTeacher
from flowmap.teachers.guidance import Autoguidance
from flowmap.teachers.network import NetworkTeacher
from tests.support.oracle import draw, draw_times


class Stream:
    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


class Device:
    """Stands in for torch.cuda's streams, and records what is asked of them."""

    def __init__(self, monkeypatch):
        self.events: list[str] = []
        self.main, self.side = Stream("main", self.events), Stream("side", self.events)
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(streams, "_side_stream", lambda device: self.side)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.note(f"kept for {stream.name}"))

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def note(self, what):
        self.events.append(what)

    def call(self, name, result):
        def velocity(x=None, t=None, cond=None):
            self.note(f"{name} on {self.current.name}")
            if isinstance(result, Exception):
                raise result
            return result

        return velocity


WAITS = ["side waits for main", "weak on side", "strong on main", "main waits for side"]


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def network(width: int = 8) -> NetworkTeacher:
    torch.manual_seed(width)
    net = FlowMapNet(MLP(width=width, depth=1).build((2,))).double()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    return NetworkTeacher(net)


def test_each_stream_waits_for_the_other_and_the_result_is_kept(device):
    one, other = torch.zeros(5), torch.ones(5)
    both = streams.on_two_streams(device.call("strong", one), device.call("weak", other), torch.device("cuda"))
    assert both[0] is one and both[1] is other
    assert device.events == [*WAITS, "kept for main"]


@pytest.mark.parametrize("fails", ["strong", "weak"])
def test_the_streams_join_if_a_call_fails(device, fails):
    calls = [device.call(n, ZeroDivisionError() if n == fails else torch.ones(5)) for n in ("strong", "weak")]
    with pytest.raises(ZeroDivisionError):
        streams.on_two_streams(*calls, torch.device("cuda"))
    assert device.events[0] == WAITS[0] and device.events[-1] == WAITS[-1]


def test_autoguidance_gives_the_same_to_the_bit_on_two_streams(device, monkeypatch):
    teacher, x, (t, _) = Autoguidance(network(8), network(16), default=2.5), draw(5, 2), draw_times()
    in_turn = teacher.velocity(x, t)
    strong, weak = teacher.strong.velocity(x, t), teacher.weak.velocity(x, t)
    assert torch.equal(in_turn, 2.5 * strong + (1 - 2.5) * weak)
    assert device.events == []  # on a CPU
    monkeypatch.setattr(guidance, "may_overlap", lambda x: True)
    assert torch.equal(teacher.velocity(x, t), in_turn)
    assert device.events == ["side waits for main", "main waits for side", "kept for main"]


def test_at_scale_one_the_weak_network_is_not_called(device, monkeypatch):
    monkeypatch.setattr(guidance, "may_overlap", lambda x: True)
    teacher, x, (t, _) = Autoguidance(network(8), network(16)), draw(5, 2), draw_times()
    assert torch.equal(teacher.velocity(x, t), teacher.strong.velocity(x, t)) and device.events == []


class OnCuda:
    """What `may_overlap` asks of a tensor."""

    device = torch.device("cuda")


def test_which_tensors_may_overlap(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(streams, "Tensor", OnCuda)
    x = OnCuda()
    assert streams.may_overlap(x)
    assert not torch.func.vmap(lambda y: y * streams.may_overlap(x))(torch.ones(2)).any()
    with monkeypatch.context() as context:
        context.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not streams.may_overlap(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not streams.may_overlap(x)


def test_neither_tensors_of_a_cpu_nor_fake_ones_may_overlap():
    assert not streams.may_overlap(torch.ones(5))
    with FakeTensorMode():
        assert not streams.may_overlap(torch.empty(5, device="cuda"))


def test_networks_that_share_modules_or_have_cuda_graphs_are_not_independent(monkeypatch):
    strong, weak = network(8), network(16)
    assert streams.independent(strong, weak)
    assert not streams.independent(strong, NetworkTeacher(FlowMapNet(strong.flow_map.net)))
    assert not streams.independent(strong, GaussianTeacher(mean=(0.2,), std=0.9))
    net = weak.flow_map.net
    net.__dict__["forward"] = Compiled(net.forward)
    assert streams.independent(strong, weak)
    net.__dict__["forward"] = Compiled(type(net).forward.__get__(net), backend=inductor_with_cuda_graphs)
    assert not streams.independent(strong, weak)


def test_sharded_networks_are_not_independent(monkeypatch):
    strong, weak = network(8), network(16)
    monkeypatch.setattr("torch.distributed.tensor.DTensor", torch.nn.Parameter)
    assert not streams.independent(strong, weak)
