"""Conditions beside the class: attributes by number, contexts shaped like a sample."""

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets import EDM2, MLP, DiT
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet

EXTRA_EMBEDDINGS = (
    ExtraCondition("kind", 4, "number"),
    ExtraCondition("length", 7, "number"),
    ExtraCondition("left", 6, "context"),
)
SHAPE = (3, 1, 2)


@pytest.fixture(params=[DiT(patch=1, width=16, depth=2, heads=2), MLP(width=16, depth=2)], ids=["dit", "mlp"])
def net(request):
    torch.manual_seed(0)
    net = request.param.build(SHAPE, extra_conditions=EXTRA_EMBEDDINGS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return FlowMapNet(net.double())


X, T, S = (
    torch.randn(5, *SHAPE, dtype=torch.float64),
    torch.linspace(0.5, 0.9, 5).double(),
    torch.linspace(0.0, 0.4, 5).double(),
)
COND = {
    "kind": torch.tensor([0, 1, 2, 3, 1]),
    "length": torch.tensor([6, 5, 0, 1, 2]),
    "left": torch.randn(5, *SHAPE, dtype=torch.float64),
}


def test_none_is_minus_one_zeros_and_absence(net):
    none = {
        "kind": torch.full((5,), -1),
        "length": torch.full((5,), -1),
        "left": torch.zeros(5, *SHAPE, dtype=torch.float64),
    }
    torch.testing.assert_close(net(X, T, S, none), net(X, T, S, None))
    torch.testing.assert_close(net(X, T, S, {"kind": COND["kind"]}), net(X, T, S, none | {"kind": COND["kind"]}))


def test_each_reaches_its_own_row_alone(net):
    before = net(X, T, S, COND)
    for key, value in (("kind", 3), ("length", 4), ("left", 1.5)):
        changed = COND[key].clone()
        changed[2] = value
        moved = (net(X, T, S, COND | {key: changed}) - before).abs().flatten(1).amax(1)
        assert float(moved[2].detach()) > 1e-6 and float(moved[[0, 1, 3, 4]].detach().max()) == 0, key


def test_the_tangent_rides_through_them(net):
    v = torch.randn(5, *SHAPE, dtype=torch.float64)
    ridden, forward = (eulerian_derivative(net, X, T, S, v, COND, mode=mode) for mode in ("dual", "forward"))
    for a, b in zip(ridden, forward, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "spec",
    [DiT(width=24, depth=1, heads=2), MLP(width=16, depth=1), EDM2(channels=8, multipliers=(1, 2), num_blocks=1)],
)
def test_any_network_reads_numbers_and_a_code_side_by_side(spec):
    torch.manual_seed(0)
    net = FlowMapNet(
        spec.build((3, 4, 4), extra_conditions=(ExtraCondition("kind", 4, "number"), ExtraCondition("z", 7, "code")))
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, t, z = torch.randn(5, 3, 4, 4), torch.full((5,), 0.5), torch.randn(5, 7)
    none = net(x, t, t / 2, {"z": z})
    torch.testing.assert_close(none, net(x, t, t / 2, {"z": z, "kind": torch.full((5,), -1)}))
    for changed in ({"z": z + 1}, {"z": z, "kind": torch.full((5,), 2)}):
        assert not torch.allclose(none, net(x, t, t / 2, changed))
    with pytest.raises(ValueError, match="z: this network is conditioned on the code"):
        net(x, t, t / 2, {})
