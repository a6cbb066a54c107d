"""Tangents of the first rows of a batch: exact in those rows, zero in the rest, never padded inside our networks."""

import pytest
import torch

from flowmap.flow.derivative import DERIVATIVES, eulerian_derivative, lagrangian_derivative, value_and_rate
from flowmap.flow.tangent import dual
from flowmap.flow.tangent import rows as dual_rows
from flowmap.flow.tangent.dual import dual_forward
from flowmap.nets import MLP, DiT
from flowmap.nets.flow_map import FlowMapNet

NETS = {
    "dit": lambda: FlowMapNet(DiT(preset="nano").build((1, 8, 8), num_classes=10, guidance=True)),
    "mlp": lambda: FlowMapNet(MLP(width=32, depth=2).build((2,), num_classes=10, guidance=True)),
}


def given(name, n=6):
    torch.manual_seed(0)
    net = NETS[name]().double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shape = (1, 8, 8) if name == "dit" else (2,)
    x, v = torch.randn(2, n, *shape, dtype=torch.float64)
    t, s = torch.rand(n, dtype=torch.float64), 0.3 * torch.rand(n, dtype=torch.float64)
    return net, x, t, s, v, {"class": torch.arange(n), "guidance": 1 + torch.rand(n, dtype=torch.float64)}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", DERIVATIVES)
@pytest.mark.parametrize("rows", [0, 1, 4, 6])
def test_the_rate_of_some_rows(name, mode, rows):
    net, x, t, s, v, cond = given(name)
    for some, full in (
        (
            eulerian_derivative(net, x, t, s, v, cond, mode=mode, rows=rows),
            eulerian_derivative(net, x, t, s, v, cond, mode=mode),
        ),
        (
            lagrangian_derivative(net, x, t, s, cond, mode=mode, rows=rows),
            lagrangian_derivative(net, x, t, s, cond, mode=mode),
        ),
    ):
        assert torch.equal(some[0], full[0]) and some[0].requires_grad and not some[1].requires_grad
        torch.testing.assert_close(some[1][:rows], full[1][:rows], rtol=1e-9, atol=1e-11)
        assert not some[1][rows:].any() and full[1].flatten(1).any(1).all()


@pytest.mark.parametrize("name", NETS)
def test_no_tangent_is_filled_up_before_the_end(name, monkeypatch):
    net, x, t, s, v, cond = given(name)
    filled, whole = [], dual_rows.whole
    monkeypatch.setattr(dual_rows, "whole", lambda x: filled.append(tuple(x.shape)) or whole(x))
    eulerian_derivative(net, x, t, s, v, cond, rows=4)
    assert filled == [tuple(x.shape)]
    lagrangian_derivative(net, x, t, s, cond, rows=4)
    assert filled == [tuple(x.shape)] * 2


def test_forward_mode_goes_through_a_transformer_layer_in_evaluation_mode():
    """Under no_grad torch would take a fused kernel there that has no forward derivative."""
    layer = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dtype=torch.float64).eval()
    x, v = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    (value, rate), (same, by_rules) = (value_and_rate(layer, (x,), (v,), mode=mode) for mode in ("forward", "dual"))
    torch.testing.assert_close((value, rate), (same, by_rules), rtol=0, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_transformer_layer_is_followed_inside(batch_first, monkeypatch):
    """Attention is one function to torch; left to torch's forward derivative, it would be computed twice."""
    monkeypatch.setattr(dual, "forward_derivative", None)
    layer = torch.nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    x, v = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    value, rate = dual_forward(layer, [x], [v])
    assert torch.equal(value, layer(x)) and value.requires_grad
    ahead, behind = layer(x + 1e-6 * v), layer(x - 1e-6 * v)
    torch.testing.assert_close(rate, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)
    some, full = (dual_forward(layer, [x], [tangent])[1] for tangent in (v[:2], torch.cat([v[:2], 0 * v[2:]])))
    torch.testing.assert_close(some, full, rtol=0, atol=1e-12)


def test_rows_that_meet_are_not_lost():
    """Where an operation mixes rows, those that were left out take tangents of the others'."""
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)
    mix = lambda x: x * x.mean(0) + torch.roll(x.sin(), 1, 0) + x.flip(0)
    full = torch.cat([v[:2], torch.zeros(3, 3, dtype=torch.float64)])
    torch.testing.assert_close(
        dual_forward(mix, [x], [v[:2]])[1], dual_forward(mix, [x], [full])[1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(0, 3), (6, 3), (2, 4), (2, 3, 1), (2,)])
def test_a_tangent_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="must have its primal's shape"):
        dual_forward(torch.sin, [torch.ones(5, 3)], [torch.ones(shape)])
