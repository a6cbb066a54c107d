"""Modules of one's own: predictions, clocks and ranges are one velocity; a widened student starts as its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flowmap.base import trust
from flowmap.flow.derivative import value_and_rate
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.module import Module, ModuleNet
from flowmap.nets.module_builders import BUILDERS, built, module, name_of
from flowmap.nets.module_clock import DDPM, Flow, Reversed, Sigma
from flowmap.teachers.exact import GaussianTeacher

MEAN, STD = 0.3, 0.4  # of the data, in our range


class Exact(nn.Module):
    """The exact prediction for Gaussian data, as a network of that prediction, clock and range gives it."""

    def __init__(self, spec: Module):
        super().__init__()
        self.spec = spec
        self.register_buffer("at", torch.zeros(()))

    def forward(self, x, time):
        spec, p = self.spec, (self.spec.range[1] - self.spec.range[0]) / 2
        mean, std = p * MEAN + sum(spec.range) / 2, p * STD
        if spec.prediction == "edm":  # x is c_in times the state, and time log(sigma) / 4
            sigma = torch.exp(4 * time)[:, None]
            size = (sigma**2 + spec.sigma_data**2).sqrt()
            denoised = mean + std**2 / (std**2 + sigma**2) * (x * size - mean)
            return (denoised - spec.sigma_data**2 / size**2 * x * size) * size / (sigma * spec.sigma_data)
        a, b = self.coefficients(time)
        spread = a**2 * std**2 + b**2
        x0, noise = mean + a * std**2 / spread * (x - a * mean), b / spread * (x - a * mean)
        towards = -1 if isinstance(spec.clock, Reversed) else 1
        return {"x0": x0, "epsilon": noise, "v": a * noise - b * x0, "velocity": towards * (noise - x0)}[
            spec.prediction
        ]

    def coefficients(self, time):
        clock, time = self.spec.clock, time[:, None]
        if isinstance(clock, Sigma):
            return torch.ones_like(time), time
        if isinstance(clock, DDPM):
            table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
            found = table[time.round().long()].to(time.dtype)
            return found.sqrt(), (1 - found).sqrt()
        share = time / clock.unit
        return (share, 1 - share) if isinstance(clock, Reversed) else (1 - share, share)


NAMED = [
    *((prediction, clock) for prediction in ("velocity", "x0", "epsilon", "v") for clock in (Flow(), Reversed(1000.0))),
    *((prediction, clock) for prediction in ("x0", "epsilon", "v") for clock in (DDPM(), Sigma())),
    ("edm", Sigma()),
]


@pytest.mark.parametrize("interval", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
@pytest.mark.parametrize(("prediction", "clock"), NAMED, ids=lambda one: str(one)[:12])
def test_every_named_prediction_is_the_same_velocity(prediction, clock, interval):
    spec = Module(module="exact", prediction=prediction, clock=clock, range=interval)
    net = ModuleNet(Exact(spec), spec, (3,), arrival=False, guidance=False)
    t = torch.tensor([0.1, 0.35, 0.5, 0.7, 0.9], dtype=torch.float64)
    if isinstance(clock, DDPM):  # times that are places of the table
        u, p = clock.build().times[[100, 300, 450, 600, 900]], (interval[1] - interval[0]) / 2
        t = u / (p * (1 - u) + u)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        net(x, t, t), GaussianTeacher(mean=(MEAN,), std=STD).velocity(x, t), rtol=2e-4, atol=2e-4
    )


class Plain(nn.Module):
    """net(x, t, label) with a submodule for time, whose tokens are (2, 3), and dropout."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 6), nn.Unflatten(1, (2, 3)))
        self.label, self.enter = nn.Embedding(5, 6), nn.Linear(4, 6)
        self.drop, self.leave = nn.Dropout(0.5), nn.Linear(6, 4)

    def embedded(self, t):
        return self.time(t[:, None])

    def forward(self, x, t, label):
        return self.leave(self.drop(torch.tanh(self.enter(x) + self.embedded(t).flatten(1) + self.label(label))))


class WithArrival(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, t, s):
        return self.layer(torch.cat([x, t[:, None], s[:, None]], 1))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("flowmap.nets.module_builders.BUILDERS", builders := dict(BUILDERS))
    builders.update(plain=Plain, with_arrival=WithArrival)
    return builders


@pytest.mark.parametrize("place", ["time", "embedded", "time.2"])
def test_a_widened_student_is_its_teacher_until_it_trains(place):
    spec = Module("plain", prediction="v", classes=4, null_class=4, time_embedding=place)
    teacher = FlowMapNet(spec.build((4,), arrival=False))
    student = FlowMapNet(spec.build((4,), num_classes=4, arrival=True, guidance=True)).train()
    start_from(student, teacher)
    x, t, s = torch.randn(7, 4), torch.rand(7), torch.zeros(7)
    cond = {"class": torch.tensor([0, 1, 2, 3, -1, 0, 1])}
    assert torch.equal(student.mean_velocity(x, t, s, cond), teacher.velocity(x, t, cond))
    student.mean_velocity(x, t, s, cond).square().mean().backward()
    assert student.net.arrival.out.weight.grad.abs().sum() > 0 and student.net.guidance.out.weight.grad.abs().sum() > 0
    copied = copy.deepcopy(student)
    nn.init.ones_(copied.net.arrival.out.bias)
    assert not torch.allclose(copied.mean_velocity(x, t, s, cond), student.mean_velocity(x, t, s, cond))


def test_the_null_class_stands_for_no_class():
    spec = Module("plain", classes=4, null_class=4)
    net, x, t = spec.build((4,), arrival=False), torch.randn(3, 4), torch.rand(3)
    assert torch.equal(net(x, t, t, {"class": torch.full((3,), -1)}), net(x, t, t))
    assert not torch.equal(net(x, t, t, {"class": torch.zeros(3, dtype=torch.int64)}), net(x, t, t))


def test_it_rides_and_its_arrival_matters_to_the_rate():
    spec = Module("plain", prediction="x0", clock=Reversed(), classes=4, time_embedding="time")
    net, x, t, one = (
        spec.build((4,)).double(),
        torch.randn(5, 4).double(),
        torch.rand(5).double(),
        torch.ones(5).double(),
    )
    nn.init.normal_(net.arrival.out.weight)
    call = lambda x, t: net(x, t, t / 3)
    value, rate = value_and_rate(call, (x, t), (torch.ones_like(x), one))
    torch.testing.assert_close(value, call(x, t))
    torch.testing.assert_close(rate, value_and_rate(call, (x, t), (torch.ones_like(x), one), mode="forward")[1])


def test_a_module_with_an_arrival_time_is_the_mean_velocity():
    net, x, t, s = Module("with_arrival").build((4,)), torch.randn(3, 4), torch.rand(3), torch.zeros(3)
    assert net.arrival is None and torch.equal(net(x, t, s), net.model(x, t, s))


@pytest.mark.parametrize("name", ["plain", "with_arrival"])
def test_it_is_built_on_the_meta_device_and_without_weights(name):
    classes = 4 if name == "plain" else None
    with torch.device("meta"):
        net = Module(name, classes=classes, time_embedding="time").build((4,))
    assert all(p.is_meta for p in net.parameters())


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, t):
        return self.layer(x)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prediction": "noise"}, "prediction: 'noise' is not one of velocity, x0"),
        ({"clock": DDPM()}, "prediction: 'velocity' wants a clock of kind flow or reversed"),
        ({"prediction": "edm"}, "prediction: 'edm' wants a clock of kind sigma"),
        ({"range": (1.0, 1.0)}, "range: (1.0, 1.0) must be a growing pair"),
        ({"arguments": "[1]"}, "arguments: '[1]' is not a mapping as JSON"),
        ({"arguments": '{"depth": 2}'}, "module: 'plain' makes no module: TypeError"),
        ({"classes": 9, "time_embedding": "time"}, "classes: 9 and null_class: None may exceed its table"),
        ({"classes": 4, "null_class": 5, "time_embedding": "time"}, "null_class: 5 may exceed its table"),
        ({"classes": 4}, "time_embedding: the module takes no arrival time s"),
        ({"classes": 4, "time_embedding": "tine"}, "no submodule or method 'tine'"),
        ({"time_embedding": "time"}, "module: cannot be called as net(x, t) with x (2, 4): TypeError"),
        ({"module": "wrong", "time_embedding": "layer"}, "module: its output has shape (2, 3), its input (2, 4)"),
        ({"module": "other"}, "module: no builder 'other' (registered: plain, with_arrival, wrong)"),
        ({"module": "os:system"}, "module: no builder 'os:system'"),
        ({"module": "with_arrival", "prediction": "x0"}, "a module that takes s gives a mean velocity on our clock"),
    ],
)
def test_what_cannot_be_built_is_refused(registered, settings, says):
    registered["wrong"] = Wrong
    with pytest.raises(ValueError) as error:
        Module(**{"module": "plain", **settings}).build((4,))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_table_smaller_than_the_classes_of_the_data_is_refused():
    with pytest.raises(ValueError, match="the data has 5 classes, the module has a table of 4 classes"):
        Module("plain", classes=4, time_embedding="time").build((4,), num_classes=5)
    with pytest.raises(ValueError, match="the data has 5 classes, the module takes no label"):
        Module("with_arrival").build((4,), num_classes=5)


def test_only_classes_of_modules_that_were_allowed_are_found(tmp_path, monkeypatch):
    """A file that names an imported function of an allowed module gets an error and no call."""
    monkeypatch.setattr(trust, "_ALLOWED", {})
    path = tmp_path / "my_nets.py"
    path.write_text("from os import system\nfrom torch import nn\nclass Mine(nn.Identity): ...\n")
    with pytest.raises(ValueError, match="its code comes from you alone: --import my_nets.py"):
        built("my_nets:Mine", "{}")
    trust.allow_import(str(path))
    assert name_of(built("my_nets:Mine", "{}")) == "my_nets:Mine"
    with pytest.raises(ValueError, match="is no class of torch.nn.Module"):
        built("my_nets:system", '{"command": "true"}')


def test_a_builder_is_registered_by_a_decorator(registered):
    @module("mine")
    def mine(width):
        return nn.Linear(width, width)

    assert built("mine", '{"width": 3}').in_features == 3
