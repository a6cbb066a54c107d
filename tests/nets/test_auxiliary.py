"""Auxiliary models: shapes, bounds of the log-variance, what reaches what; networks that are told a code."""

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.auxiliary import ConvPrior, TransformerPrior
from flowmap.nets.dit import DiT
from flowmap.nets.edm2 import EDM2
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.mlp import MLP
from tests.support.oracle import draw

SHAPE = (3, 4, 6)
TOLD = (ExtraCondition("z", 7, "code"),)
KINDS = pytest.mark.parametrize(
    "spec",
    [
        ConvPrior(size=7, channels=(8, 16), groups=4, log_variance=(-3.0, 1.0)),
        TransformerPrior(size=7, width=24, depth=2, heads=2, log_variance=(-3.0, 1.0)),
    ],
    ids=["conv", "transformer"],
)


def built(spec):
    torch.manual_seed(0)
    return spec.build(SHAPE)


@KINDS
def test_shapes_and_bounds(spec):
    net, x = built(spec), 50 * draw(5, *SHAPE, dtype=torch.float32)
    mean, logvar = net.encode(x)
    assert mean.shape == logvar.shape == (5, 7) and logvar.abs().max() <= 10
    mean, logvar = net.decode(100 * mean)
    assert mean.shape == logvar.shape == (5, *SHAPE)
    assert -3 <= logvar.min() and logvar.max() <= 1
    assert net(x).shape == x.shape


@KINDS
def test_rows_do_not_meet_and_every_weight_has_a_gradient(spec):
    net, x = built(spec).double(), draw(5, *SHAPE)
    with torch.no_grad():
        for parameter in net.parameters():  # gates are zero at the start
            parameter.add_(0.05 * torch.randn_like(parameter))
    mean, logvar = net.decode(net.encode(x)[0])
    moved = x.clone()
    moved[2] += 1
    other = net.decode(net.encode(moved)[0])[0]
    same = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(mean[same], other[same], rtol=0, atol=1e-12)
    assert not torch.allclose(mean[2], other[2])
    (mean.square().sum() + logvar.square().sum() + net.encode(x)[1].square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@pytest.mark.parametrize("spec", [ConvPrior(channels=(8, 8, 8)), TransformerPrior(patch=3)])
def test_a_shape_that_does_not_fit_is_named(spec):
    with pytest.raises(ValueError, match="channels|patch"):
        spec.build(SHAPE)


@pytest.mark.parametrize(
    "spec",
    [DiT(width=24, depth=2, heads=2), MLP(width=16, depth=1), EDM2(channels=8, multipliers=(1, 2), num_blocks=1)],
)
def test_a_network_that_is_told_a_code_depends_on_it_and_rides(spec):
    torch.manual_seed(0)
    shape = (3, 4, 4)
    net = spec.build(shape, arrival=True, extra_conditions=TOLD).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow_map = FlowMapNet(net)
    x, z, v = draw(5, *shape), draw(5, 7, seed=1), draw(5, *shape, seed=2)
    t, s = torch.full((5,), 0.7).double(), torch.full((5,), 0.2).double()
    told = flow_map(x, t, s, {"z": z})
    assert not torch.allclose(told, flow_map(x, t, s, {"z": z + 1}))
    ridden, forward = (
        eulerian_derivative(flow_map, x, t, s, v, {"z": z}, mode=mode)[1] for mode in ("dual", "forward")
    )
    torch.testing.assert_close(ridden, forward, rtol=1e-8, atol=1e-10)


def test_a_map_starts_from_a_velocity_that_is_told_a_code():
    spec = DiT(width=24, depth=1, heads=2)
    velocity, flow_map = (
        FlowMapNet(spec.build((1, 4, 4), arrival=arrival, extra_conditions=TOLD)) for arrival in (False, True)
    )
    start_from(flow_map, velocity)
    x, cond, t = torch.randn(5, 1, 4, 4), {"z": torch.randn(5, 7)}, torch.rand(5)
    torch.testing.assert_close(flow_map.mean_velocity(x, t, t / 2, cond), velocity.mean_velocity(x, t, t, cond))
    with pytest.raises(ValueError, match="not the teacher's"):
        start_from(flow_map, FlowMapNet(spec.build((1, 4, 4), arrival=False)))
