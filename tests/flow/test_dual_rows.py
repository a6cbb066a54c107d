"""Tangents of the first rows of a batch: exact in those rows, zero in the rest, never padded inside our networks."""

import pytest
import torch
import torch.nn.functional as F

from flowmap.flow.derivative import DERIVATIVES, eulerian_derivative, lagrangian_derivative, value_and_rate
from flowmap.flow.tangent import dual
from flowmap.flow.tangent import rows as dual_rows
from flowmap.flow.tangent.dual import dual_forward
from flowmap.nets import MLP, DiT
from flowmap.nets.flow_map import FlowMapNet
from tests.support.families import FAMILIES, SHAPE

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


@pytest.mark.parametrize("name", FAMILIES)
def test_nor_is_one_inside_the_families(name, monkeypatch):
    filled, whole = [], dual_rows.whole
    monkeypatch.setattr(dual_rows, "whole", lambda x: filled.append(tuple(x.value.shape)) or whole(x))
    monkeypatch.setattr(dual, "whole", dual_rows.whole)
    student, t = FAMILIES[name].student(), torch.rand(5)
    x, v = torch.randn(2, 5, *SHAPE)
    eulerian_derivative(student, x, t, 0.5 * t, v, FAMILIES[name].conditions(5), rows=3)
    assert filled == [tuple(x.shape)]


KEPT = {
    "sum": lambda x: x.sum((1, -1)),
    "sum, kept": lambda x: x.sum(2, keepdim=True),
    "mean": lambda x: torch.mean(x, dim=[1]),
    "logsumexp": lambda x: x.logsumexp(3),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=[1], keepdim=True),
    "norm": lambda x: x.norm(dim=-1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "narrow": lambda x: x.narrow(2, 1, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "expand": lambda x: x[:, :1].expand(5, 4, 4, 6),
    "expand, more dimensions": lambda x: x.expand(2, 5, -1, -1, -1),
    "broadcast_to": lambda x: x[..., :1].broadcast_to(5, 3, 4, 7),
    "expand_as": lambda x: x[..., :1].expand_as(torch.ones(5, 3, 4, 6)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat, more dimensions": lambda x: x.repeat(2, 1, 1, 1, 1),
    "tile": lambda x: x.tile(2, 1),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2), value=1.0),
    "pad, reflected": lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"),
    "einsum": lambda x: torch.einsum("nhwc -> nchw", x),
    "einsum, a sum": lambda x: torch.einsum("nhwc->wn", x),
    "stack": lambda x: torch.stack([x, x.sin()], -1),
    "stack, before": lambda x: torch.stack([x, x.sin(), torch.ones_like(x)]),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 2], 1)[1],
    "tensor_split": lambda x: x.tensor_split(2, dim=-1)[0],
    "baddbmm": lambda x: torch.baddbmm(x[:, 0], x[:, 1, :, :4], x[:, 2]),
    "attention by keywords": lambda x: F.scaled_dot_product_attention(query=x, key=x.sin(), value=x),
}
LOST = {
    "sum over rows": lambda x: x.sum(0),
    "mean of all": lambda x: x.mean(),
    "norm over rows": lambda x: torch.linalg.vector_norm(x, dim=(0, 2)),
    "repeated rows": lambda x: x.repeat(2, 1, 1, 1),
    "padded rows": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
    "einsum over rows": lambda x: torch.einsum("nhwc->hwc", x),
    "einsum of two": lambda x: torch.einsum("nhwc,nhwd->ncd", x, x.cos()),
    "narrowed rows": lambda x: x.narrow(0, 1, 4),
    "rows in order": lambda x: x.cumsum(0),
    "one split among rows": lambda x: x.split_with_sizes([1, 4])[1],
}


@pytest.mark.parametrize("name", [*KEPT, *LOST])
def test_rows_are_kept_where_they_do_not_meet_and_change_no_bit(name, monkeypatch):
    function, filled, whole = (KEPT | LOST)[name], [], dual_rows.whole
    monkeypatch.setattr(dual_rows, "whole", lambda x: filled.append(x) or whole(x))
    monkeypatch.setattr(dual, "whole", dual_rows.whole)
    x, v = torch.randn(2, 5, 3, 4, 6)
    value, some = dual_forward(function, [x], [v[:2]])
    full = torch.cat([v[:2], torch.zeros_like(v[2:])])
    assert torch.equal(value, function(x)) and torch.equal(some, dual_forward(function, [x], [full])[1])
    assert some.any() and (name in LOST or len(filled) == 1)


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
