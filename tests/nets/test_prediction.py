"""A network that predicts the data: the same map for an exact one, x at s = t, finite everywhere, and it trains."""

import json

import pytest
import torch

from flowmap.base.schema import RecipeError, to_plain
from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.distance import Squared
from flowmap.flow.path import Linear
from flowmap.nets import MLP, DiT
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.prediction import LEAST, as_velocity
from flowmap.objectives import MeanFlow
from flowmap.recipe import read_recipe
from flowmap.recipe.kinds import TABLES
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.config_file import config_json, read_config
from flowmap.teachers.exact import GaussianTeacher
from tests.support.oracle import GAUSSIAN, SHAPE, draw, draw_times

NETS = [DiT(preset="nano", depth=1, prediction="data"), MLP(width=16, depth=1, prediction="data")]
each = pytest.mark.parametrize("spec", NETS, ids=["dit", "mlp"])


def built(spec, seed=0):
    torch.manual_seed(seed)
    net = FlowMapNet(spec.build(SHAPE[1:]))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.double()


def test_the_exact_data_predictions_are_the_exact_flow_map():
    x, (t, s) = draw(), draw_times()
    exact = GAUSSIAN.mean_velocity(x, t, s)
    for at in (t, torch.linspace(0, 1, 5).double()):
        out = x - at.clamp_min(LEAST).reshape(5, 1, 1, 1) * exact
        torch.testing.assert_close(as_velocity("data", out, x, at), exact, rtol=1e-12, atol=1e-12)
    assert as_velocity("velocity", exact, x, t) is exact


@each
def test_a_jump_to_the_data_is_the_output_and_a_jump_to_nowhere_is_x(spec, monkeypatch):
    net, x, (t, s) = built(spec), draw(), draw_times()
    assert torch.equal(net(x, t, t), x)
    zero, seen = torch.zeros_like(s), []
    net.net.leave.register_forward_hook(lambda module, given, out: seen.append(out))
    arrival = net(x, t.clamp_min(LEAST), zero)
    out = net.net._image(seen[0]) if isinstance(spec, DiT) else seen[0].reshape(SHAPE)
    torch.testing.assert_close(arrival, out)
    blank = spec.build(SHAPE[1:]).double()
    if isinstance(spec, DiT):  # its last layer starts at zero
        torch.testing.assert_close(blank(x, t, s), x / t.clamp_min(LEAST).reshape(5, 1, 1, 1))


@each
def test_everything_is_finite_at_the_ends_of_time(spec):
    net, x = built(spec).float(), draw(dtype=torch.float32)
    t = torch.tensor([0.0, 1e-7, LEAST, 1.0, 1.0])
    s = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    mean, rate = eulerian_derivative(net, x, t, s, x)
    for value in (net(x, t, s), mean, rate):
        assert value.dtype == torch.float32 and bool(torch.isfinite(value).all())


@each
def test_the_dual_forward_carries_the_tangent_through_the_conversion(spec):
    net, x, (t, s), v = built(spec), draw(), draw_times(), draw(seed=4)
    t = torch.cat([t[:4], torch.tensor([0.02]).double()])  # the last one below LEAST
    s = torch.minimum(t, s)
    for one, other in zip(
        *(eulerian_derivative(net, x, t, s, v, mode=mode) for mode in ("dual", "forward")), strict=True
    ):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-9, atol=1e-9)


def test_training_reaches_the_closed_form_of_a_gaussian():
    """One-step samples have the law of the data; the untrained network's are at zero."""
    teacher = GaussianTeacher(mean=(0.7,), std=0.4)
    torch.manual_seed(0)
    student = FlowMapNet(MLP(width=64, depth=2, prediction="data").build((2,)))
    objective, optimizer = MeanFlow(distance=Squared()), torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 600)
        t, s = torch.rand(2, 256).sort(dim=0, descending=True).values
        t, s = torch.where(torch.rand(256) < 0.2, 1.0, t), torch.where(torch.rand(256) < 0.3, t, s)
        sample = Linear().sample(0.7 + 0.4 * torch.randn(256, 2), torch.randn(256, 2), t, s, None)
        optimizer.zero_grad()
        objective(student, teacher, sample, step).value.backward()
        optimizer.step()
    x, one, zero = draw(2000, 2).float(), torch.ones(2000), torch.zeros(2000)
    with torch.no_grad():
        error = (student(x, one, zero) - teacher.flow_map(x, one, zero)).square().mean().sqrt()
    assert float(error) < 0.15  # 0.8 without training; a small network after 600 steps


@each
def test_a_students_file_and_a_recipes_hash_name_it_where_it_is_used(spec, tmp_path):
    config = StudentConfig(spec, Deterministic(), SHAPE[1:])
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert read_config(tmp_path / "config.json").net == spec
    assert "prediction" not in to_plain(type(spec)(), TABLES, hashed=True)


def test_weights_of_another_prediction_are_refused_and_those_of_its_own_are_taken():
    student, own = (FlowMapNet(NETS[1].build(SHAPE[1:])) for _ in range(2))
    with pytest.raises(
        ValueError, match="student.prediction: 'data' cannot start with weights that predict 'velocity'"
    ):
        start_from(student, FlowMapNet(MLP(width=16, depth=1).build(SHAPE[1:])))
    start_from(student, own)
    x, (t, s) = draw().float(), (one.float() for one in draw_times())
    torch.testing.assert_close(student(x, t, s), own(x, t, s))


def test_mistakes_are_named():
    for spec in (DiT, MLP):
        with pytest.raises(ValueError, match="prediction: 'noise' is not one of velocity, data"):
            spec(prediction="noise")
    with pytest.raises(RecipeError, match="student.prediction"):
        read_recipe("digits", ["student.prediction=data"])
