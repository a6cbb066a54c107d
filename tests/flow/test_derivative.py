"""Derivatives of networks: all modes agree, the dual forward equals the ordinary one, no tangent is dropped."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowmap.flow.derivative import (
    DERIVATIVES,
    MODES,
    LayerNormByParts,
    eulerian_derivative,
    inward_step,
    lagrangian_derivative,
    value_and_graded_rate,
    value_and_rate,
    without_graph,
)
from flowmap.flow.tangent.dual import DualTensor, dual_forward

B, N, D = 5, 6, 12


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(
            nn.RMSNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * D, D)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Net(nn.Module):
    """A small attention net with the contract of a student; x is (B, N, D)."""

    def __init__(self, dropout=0.0, checkpointed=None):
        super().__init__()
        self.times, self.blocks, self.checkpointed = (
            nn.Linear(4, D),
            nn.ModuleList(Block(dropout) for _ in range(2)),
            checkpointed,
        )

    def forward(self, x, t, s):
        times = torch.stack([t.sin(), t.cos(), s.sin(), (3 * s).cos()], -1).to(x.dtype)
        x = x + self.times(times)[:, None]
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return x

    def mean_velocity(self, x, t, s, cond=None):
        return self(x, t, s)


def setting(dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = Net(**options).to(dtype)
    x, v = torch.randn(2, B, N, D, dtype=dtype).unbind(0)
    t = torch.rand(B, dtype=dtype) * 0.9 + 0.05
    return net, x, t, t * 0.6, v


def gradients(net, value, rate):
    net.zero_grad()
    (value - (value - 0.3 * rate).detach()).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def richardson(f, h=1e-3):
    """The derivative of f at 0, error of order h^4: (4 D(h/2) - D(h)) / 3 with central differences D."""
    D = lambda h: (f(h) - f(-h)) / (2 * h)
    return (4 * D(h / 2) - D(h)) / 3


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_derivative_along_the_path(mode):
    net, x, t, s, v = setting()
    with torch.no_grad():
        truth = richardson(lambda h: net(x + h * v, t + h, s))
    value, rate = eulerian_derivative(net, x, t, s, v, mode=mode)
    torch.testing.assert_close(value, net(x, t, s), rtol=1e-12, atol=1e-12)
    assert value.requires_grad and not rate.requires_grad and type(value) is type(rate) is torch.Tensor
    torch.testing.assert_close(
        rate, truth, rtol=1e-6, atol=1e-6
    )  # a one-sided step of 1e-7 errs by 1e-7 times the second derivative


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_derivative_in_arrival(mode):
    net, x, t, s, _ = setting()
    with torch.no_grad():
        truth = richardson(lambda h: net(x, t, s + h))
    value, rate = lagrangian_derivative(net, x, t, s, mode=mode)
    assert value.requires_grad and not rate.requires_grad
    torch.testing.assert_close(rate, truth, rtol=1e-6, atol=1e-6)


def test_a_graded_rate_has_the_same_value_and_its_own_gradient():
    net, x, t, s, _ = setting()
    value, rate = value_and_graded_rate(lambda s: net(x, t, s), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(rate.detach(), lagrangian_derivative(net, x, t, s)[1])
    got = torch.autograd.grad((value * value + rate * rate).sum(), net.times.weight)[0]
    by_hand = (net(x, t, s + 1e-5) - net(x, t, s - 1e-5)) / 2e-5
    expected = torch.autograd.grad((net(x, t, s) ** 2 + by_hand**2).sum(), net.times.weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_layer_norm_by_parts_is_torchs_own():
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    layers = (nn.LayerNorm(4, eps=1e-2).double(), nn.LayerNorm((6, 4), elementwise_affine=False))
    nn.init.normal_(layers[0].weight), nn.init.normal_(layers[0].bias)
    for call in (*layers, lambda x: torch.layer_norm(x, (4,)), nn.GroupNorm(3, 6).double()):
        with LayerNormByParts():
            ours = call(x)
        torch.testing.assert_close(ours, call(x))


def test_without_graph_is_the_same_number_and_changes_no_setting():
    net, x, t, s, _ = setting(torch.float32)
    value = without_graph(net, x, t.half(), s)
    assert not value.requires_grad and torch.equal(value, net(x, t.half().float(), s).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu")
        assert torch.equal(without_graph(net, x, t, s), net(x, t, s).detach())
        assert (torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu")) == before
    assert not torch.is_autocast_enabled("cpu")


def test_dual_is_forward_mode_to_rounding():
    net, x, t, s, v = setting()
    torch.testing.assert_close(
        eulerian_derivative(net, x, t, s, v)[1],
        eulerian_derivative(net, x, t, s, v, mode="forward")[1],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_and_its_gradients_are_bit_equal_to_an_ordinary_forward(dtype):
    net, x, t, s, v = setting(dtype)
    value, rate = eulerian_derivative(net, x, t, s, v)
    plain = net(x, t, s)
    assert torch.equal(value, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, value, rate), gradients(net, plain, rate), strict=True))


def test_the_graph_saves_no_tangent():
    net, x, t, s, v = setting()

    def saved(run):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: sizes.append((type(a), a.numel())) or a, lambda a: a):
            run()
        return sizes

    assert saved(lambda: eulerian_derivative(net, x, t, s, v)) == saved(lambda: net(x, t, s))


def test_no_tangent_outlives_the_dual_forward():
    net, x, t, s, v = setting()
    alive = []
    for module in net.modules():
        module.register_forward_hook(lambda m, i, o: alive.append(weakref.ref(o.tangent)))
    value, rate = eulerian_derivative(net, x, t, s, v)
    assert len(alive) > 10 and value.requires_grad
    assert [ref() is None or ref() is rate for ref in alive] == [True] * len(alive)


@pytest.mark.parametrize("mode", DERIVATIVES)
def test_dropout_draws_one_mask_for_value_and_rate(mode):
    net, x, t, s, v = setting(dropout=0.5)
    torch.manual_seed(3)
    value, rate = eulerian_derivative(net, x, t, s, v, mode=mode)
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(value, net(x, t, s))
    assert torch.equal(following, torch.rand(1))  # the generator is where one forward leaves it

    def moved(h):
        torch.manual_seed(3)
        return net(x + h * v, t + h, s).detach()

    torch.testing.assert_close(rate, richardson(moved), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["dual", "forward"])
def test_bf16_autocast_keeps_the_rate_within_two_percent_and_the_gradients(mode):
    net, x, t, s, v = setting(torch.float32)
    _, exact = eulerian_derivative(net, x, t, s, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, rate = eulerian_derivative(net, x, t, s, v, mode=mode)
        plain = net(x, t, s)
    assert torch.equal(value, plain)
    assert (rate - exact).norm() < 0.02 * exact.norm()  # bfloat16 keeps 8 bits: 0.4 % a rounding
    assert all(g.abs().sum() > 0 for g in gradients(net, value, rate))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    net, x, t, s, v = setting()
    value, rate = eulerian_derivative(net, x, t, s, v)
    reference = gradients(net, value, rate)
    net.checkpointed = reentrant
    again, rate_again = eulerian_derivative(net, x, t, s, v)
    assert torch.equal(value, again) and torch.equal(rate, rate_again)
    for a, b in zip(gradients(net, again, rate_again), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_recomputation_under_checkpointing_carries_no_tangent(monkeypatch):
    import flowmap.flow.tangent.dual as module

    net, x, t, s, v = setting(checkpointed=False)
    value, rate = eulerian_derivative(net, x, t, s, v)
    monkeypatch.setattr(module, "with_tangent", lambda *a: pytest.fail("a tangent was computed in the backward pass"))
    gradients(net, value, rate)


def test_module_hooks_and_tensor_hooks_see_the_ordinary_graph():
    net, x, t, s, v = setting()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, i, o: o.register_hook(lambda g: seen.append(g.norm())) and None)
        block.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].norm()))
    value, rate = eulerian_derivative(net, x, t, s, v)
    reference = richardson(lambda h: net(x + h * v, t + h, s).detach())
    gradients(net, value, rate)
    assert len(seen) == 4
    torch.testing.assert_close(rate, reference, rtol=1e-6, atol=1e-6)


def test_no_grad_and_inference_mode_keep_the_tangent():
    net, x, t, s, v = setting()
    _, rate = eulerian_derivative(net, x, t, s, v)
    with torch.no_grad():
        value, inside = eulerian_derivative(net, x, t, s, v)
    assert torch.equal(rate, inside) and not value.requires_grad
    with torch.inference_mode():
        assert torch.equal(rate, eulerian_derivative(net, x, t, s, v)[1])
    inner = lambda x: x * torch.no_grad()(torch.sin)(x)  # no_grad cuts gradients, not tangents
    torch.testing.assert_close(dual_forward(inner, (x,), (v,))[1], v * (x.sin() + x * x.cos()))


def test_a_constant_has_rate_zero_and_detach_makes_one():
    x, v = torch.randn(B, 3), torch.randn(B, 3)
    for mode in ("dual", "forward"):
        assert (value_and_rate(lambda x: torch.ones(B, 3) * 2, (x,), (v,), mode=mode)[1] == 0).all()
        torch.testing.assert_close(
            value_and_rate(lambda x: x * x.detach(), (x,), (v,), mode=mode)[1], v * x if mode == "dual" else v * x
        )


def test_a_tangent_of_none_costs_nothing():
    x, v, calls = torch.randn(B, 3), torch.randn(B, 3), []

    def function(a, b):
        calls.append((type(a), type(b)))
        return a * b

    value, rate = dual_forward(function, (x, v), (None, v))
    assert calls == [(torch.Tensor, DualTensor)] and torch.equal(rate, x * v)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class DoubledWithJvp(Doubled):
    @staticmethod
    def jvp(ctx, t):
        return t * 2


doubled_bound_early = Doubled.apply


@torch.library.custom_op("flowmap_test::doubled", mutates_args=())
def custom_doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


REFUSED = {
    "Doubled": lambda x: Doubled.apply(x),
    "Doubled (bound early)": lambda x: doubled_bound_early(x.sin()),
    "flowmap_test.doubled": lambda x: custom_doubled(x),
    ".data": lambda x: x.data * 2,
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "__array__": lambda x: torch.as_tensor(__import__("numpy").asarray(x)),
    "__float__": lambda x: x * float(x[0, 0]),
    "add_": lambda x: x.sin().add_(1),
    "Tensor.add_": lambda x: _iadd(x.sin()),
    "__setitem__": lambda x: _setitem(torch.zeros_like(x), x),
    "copy_": lambda x: torch.zeros(x.shape).copy_(x),
    "torch.add": lambda x: torch.add(x, 1, out=torch.empty(x.shape)),
    "relu": lambda x: F.relu(x.sin(), inplace=True),
    "silu": lambda x: F.silu(x.sin(), True),
    "dropout": lambda x: F.dropout(x.sin(), 0.0, True, True),
    "relu_": lambda x: torch.relu_(x.sin()),
    "Tensor.view": lambda x: x.view(torch.int32),
    "dropout_p": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "a dual forward inside a dual forward": lambda x: dual_forward(torch.sin, (x,), (torch.ones(x.shape),))[0],
    "backward": lambda x: x.sum().backward(),
    "grad": lambda x: torch.autograd.grad(x.sum(), x)[0],
}


def _iadd(x):
    x += 1
    return x


def _setitem(y, x):
    y[0] = x[0]
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_drop_a_tangent_is_refused_by_name(name):
    x = torch.randn(B, 3)
    with pytest.raises(NotImplementedError, match=name.split(" (")[0].replace(".", r"\.")):
        dual_forward(REFUSED[name], (x,), (torch.randn(B, 3),))


def test_an_autograd_function_with_a_jvp_has_a_tangent():
    x, v = torch.randn(B, 3), torch.randn(B, 3)
    assert torch.equal(dual_forward(lambda x: DoubledWithJvp.apply(x).sin(), (x,), (v,))[1], 2 * v * (2 * x).cos())
    assert "apply" not in torch.autograd.Function.__mro__[1].__dict__  # torch is left as it was found


def test_scripted_and_traced_code_has_a_tangent():
    x, v = torch.randn(2, B, 3, dtype=torch.float64).unbind(0)
    script = torch.jit.script(scripted)
    truth = v * (x.sin() + x * x.cos())
    torch.testing.assert_close(dual_forward(lambda x: script(x) * 1, (x,), (v,))[1], truth)
    net, x, t, s, v = setting()
    traced = torch.jit.trace(net, (x, t, s))
    torch.testing.assert_close(
        value_and_rate(lambda x: traced(x, t, s), (x,), (v,))[1], value_and_rate(lambda x: net(x, t, s), (x,), (v,))[1]
    )


def scripted(x):
    return x * torch.sin(x)


@pytest.mark.slow  # importing the compiler takes seconds
def test_a_compiled_network_is_ridden_eagerly_and_stays_compiled():
    net, x, t, s, v = setting()
    frames = []
    compiled = torch.compile(net, backend=lambda graph, inputs: frames.append(graph) or graph.forward)
    compiled(x, t, s)
    num_frames = len(frames)
    value, rate = value_and_rate(lambda x: compiled(x, t, s), (x,), (v,))
    assert torch.equal(rate, value_and_rate(lambda x: net(x, t, s), (x,), (v,))[1])
    compiled(x, t, s)
    assert len(frames) == num_frames > 0


def test_a_finished_dual_forward_leaves_constants():
    x, kept = torch.randn(B, 3), []
    dual_forward(lambda x: kept.append(x * 2) or x, (x,), (torch.ones_like(x),))
    assert type(kept[0] * 1) is torch.Tensor
    _, rate = dual_forward(lambda x: x * kept[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(rate, 2 * x)


def test_half_precision_times_become_float32():
    net, x, t, s, v = setting(torch.float32)
    seen = []
    net.mean_velocity = lambda x, t, s, cond: seen.extend([t.dtype, s.dtype]) or net(x, t, s)
    eulerian_derivative(net, x, t.bfloat16(), s.bfloat16(), v)
    lagrangian_derivative(net, x, t.half(), s.half())
    assert set(seen) == {torch.float32}


def test_a_difference_stays_inside_the_interval():
    t, s = torch.tensor([0.0, 0.5, 0.9999, 1.0]), torch.tensor([0.0, 0.4999, 0.9999, 0.0])
    x = torch.zeros(4, 3)
    departures, arrivals = t + inward_step(x, t, None), s + inward_step(x, s, t)
    assert ((departures >= 0) & (departures <= 1)).all() and len(inward_step(x, t, None).abs().unique()) == 1
    assert (arrivals[1:] <= t[1:]).all() and (arrivals >= 0).all()


def test_a_user_s_mistake_is_named():
    x = torch.randn(B, 3)
    with pytest.raises(ValueError, match="must be one of dual, forward, joint, difference, got 'reverse'"):
        value_and_rate(torch.sin, (x,), (x,), mode="reverse")
    with pytest.raises(ValueError, match="step belongs to mode 'difference'"):
        value_and_rate(torch.sin, (x,), (x,), step=0.1)
    with pytest.raises(ValueError, match="primal's shape"):
        value_and_rate(torch.sin, (x,), (x[0],))
    with pytest.raises(ValueError, match="one tensor"):
        value_and_rate(lambda x: (x, x), (x,), (x,))
    with pytest.raises(ValueError, match="as many tangents"):
        value_and_rate(torch.sin, (x,), (x, x))


def test_a_copy_of_the_network_has_the_same_tangent():
    net, x, t, s, v = setting()
    eulerian_derivative(net, x, t, s, v)
    assert torch.equal(eulerian_derivative(copy.deepcopy(net), x, t, s, v)[1], eulerian_derivative(net, x, t, s, v)[1])
