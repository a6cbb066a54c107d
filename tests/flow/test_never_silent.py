"""A tangent is never dropped silently: every operation on a dual tensor has an exact tangent or raises with its name.

Each case is a function of a (5, 3) tensor x in float64, the dual tensor, and s, one of its numbers as a 0-dim dual
tensor.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import OrderedDict

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap.flow.derivative import value_and_rate
from flowmap.flow.tangent.dual import DualTensor, dual_forward
from flowmap.flow.tangent.watch import HIDDEN

W = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
Z = torch.complex(W, W.flip(0))


def inner(function, *args):
    """A function's first result."""
    out = function(*args)
    return out[0] if isinstance(out, tuple) else out


def written(make, write):
    """What was written into a tensor without a tangent."""
    y = make()
    write(y)
    return y


def within(context, function):
    with context:
        return function()


class Held(torch.autograd.Function):
    """Reads something that is no argument."""

    @staticmethod
    def forward(ctx, y, hold):
        return y + hold[0].sin()

    @staticmethod
    def backward(ctx, g):
        return g, None


class Hold(list):
    pass


FOLLOWED = {
    "complex tanh": lambda x, s: torch.tanh(torch.complex(x, x.flip(0))).abs(),
    "complex sigmoid": lambda x, s: torch.sigmoid(torch.complex(x, x.flip(0))).abs(),
    "complex silu": lambda x, s: F.silu(torch.complex(x, x.flip(0))).abs(),
    "complex sgn": lambda x, s: torch.sgn(torch.complex(x, x.flip(0))).real,
    "complex product": lambda x, s: (Z * torch.complex(x, x * x) / Z.flip(0)).imag,
    "as_subclass(Tensor)": lambda x, s: x.as_subclass(Tensor).sin(),
    "as_tensor": lambda x, s: torch.as_tensor(x).sin() + torch.asarray(x),
    "where by keywords": lambda x, s: torch.where(condition=x > 0, input=x.sin(), other=x * x),
    "where, its input alone": lambda x, s: torch.where(condition=W > 0, input=x, other=W),
    "sum by numpy's names": lambda x, s: torch.sum(x * x, axis=1, keepdims=True),
    "matmul by keywords": lambda x, s: torch.matmul(input=x, other=x.mT),
    "mm by keywords": lambda x, s: torch.mm(input=W.mT, mat2=x),
    "full_like": lambda x, s: torch.full_like(x, s * s) + x.new_full((5, 3), s),
    "heaviside": lambda x, s: torch.heaviside(torch.zeros(5, 3, dtype=torch.float64), x.sin()),
    "clamp between dual tensors": lambda x, s: W.clamp(s - 0.5, s + 0.1) + x.clamp(min=s),
    "masked_fill with a number": lambda x, s: W.masked_fill(W > 0, s.sin()),
    "nested lists": lambda x, s: torch.cat([torch.stack([x, x.sin()]), torch.stack([W, x])]),
    "ordered dict": lambda x, s: F.linear(**OrderedDict(input=x, weight=x)),
    "foreach": lambda x, s: torch._foreach_mul([x, x.sin()], 2.0)[1] * torch._foreach_exp([x])[0],
    "rnn": lambda x, s: torch.nn.LSTM(3, 3, dtype=torch.float64)(x[:2])[0],
    "fft": lambda x, s: torch.fft.irfft(torch.fft.rfft(x, dim=0) * Z[:3], n=5, dim=0),
    "linalg": lambda x, s: torch.linalg.solve(x.mT @ x + torch.eye(3).double(), x.mT),
    "vector_norm": lambda x, s: torch.linalg.vector_norm(x, dim=1, keepdim=True) + torch.norm(x) + x.norm(dim=0),
    "vector_norm of complex numbers": lambda x, s: torch.linalg.vector_norm(torch.complex(x, x.flip(0)), dim=1),
    "einsum": lambda x, s: torch.einsum("bi,bj->ij", x, x),
    "the same tensor twice": lambda x, s: torch.addcmul(x, x, x),
    "y.grad =": lambda x, s: written(lambda: W.clone(), lambda y: setattr(y, "grad", x)).grad,
    "constants": lambda x, s: x * x.floor() + x.argmax(1, keepdim=True) * (x > 0) + torch.ones_like(x) + len(x),
}
REFUSED = {
    "vmap": lambda x, s: torch.func.vmap(torch.sin)(x),
    "vmap over another, closing over x": lambda x, s: torch.func.vmap(lambda a: a * x)(torch.ones(2, 1, 1)),
    "grad": lambda x, s: torch.func.grad(lambda y: y.sin().sum())(x),
    "vjp": lambda x, s: torch.func.vjp(torch.sin, x)[1](W)[0],
    "jvp": lambda x, s: torch.func.jvp(torch.sin, (x,), (W,))[1],
    "jacrev": lambda x, s: torch.func.jacrev(torch.sin)(x),
    "forward_ad": lambda x, s: within(
        torch.autograd.forward_ad.dual_level(), lambda: torch.autograd.forward_ad.make_dual(x, W)
    ),
    "autograd.backward": lambda x, s: (torch.autograd.backward((x * W.clone().requires_grad_()).sum()), x)[1],
    "autograd.functional": lambda x, s: torch.autograd.functional.vjp(torch.sin, x, W)[1],
    "autograd.functional, as its direction": lambda x, s: torch.autograd.functional.jvp(torch.sin, W, x)[1],
    "as_tensor(dtype=)": lambda x, s: torch.as_tensor(x, dtype=torch.float32),
    "asarray(dtype=)": lambda x, s: torch.asarray(x, dtype=torch.float32),
    "tensor": lambda x, s: torch.tensor(x),
    "tensor of a list": lambda x, s: torch.tensor([s, s]),
    "new_tensor": lambda x, s: W.new_tensor([s, 1.0]),
    "new_tensor of x": lambda x, s: x.new_tensor(x),
    "scalar_tensor": lambda x, s: torch.scalar_tensor(s),
    "full": lambda x, s: torch.full((3,), s),
    "linspace": lambda x, s: torch.linspace(s, 1, 3),
    "arange": lambda x, s: torch.arange(s, s + 3),
    "sparse_coo_tensor": lambda x, s: torch.sparse_coo_tensor(torch.arange(5)[None], x, (5, 3)).to_dense(),
    "sparse": lambda x, s: (x.to_sparse() * 2).to_dense(),
    "nested_tensor": lambda x, s: torch.nested.as_nested_tensor([x, x]).to_padded_tensor(0.0),
    "Parameter": lambda x, s: Tensor._make_subclass(torch.nn.Parameter, x),
    "as_subclass": lambda x, s: x.as_subclass(torch.nn.Parameter),
    "z.real =": lambda x, s: written(lambda: Z.clone(), lambda z: setattr(z, "real", x)).abs(),
    "z.imag =": lambda x, s: written(lambda: Z.clone(), lambda z: setattr(z, "imag", x)).abs(),
    "y.data =": lambda x, s: written(lambda: W.clone(), lambda y: setattr(y, "data", x)),
    "set_": lambda x, s: W.clone().set_(x),
    "x.set_": lambda x, s: x.set_(W),
    "index_put_": lambda x, s: W.clone().index_put_((torch.tensor([0]),), x[:1]),
    "foreach in place": lambda x, s: written(lambda: W.clone(), lambda y: torch._foreach_add_([y], [x])),
    "out=": lambda x, s: torch.cumsum(x, 0, out=W.clone()),
    "stack(out=)": lambda x, s: torch.stack([x, x], out=torch.empty(2, 5, 3).double()),
    "cat(out=)": lambda x, s: torch.cat([x, x], out=torch.empty(10, 3).double()),
    "out= of several": lambda x, s: torch.max(x, 0, out=(torch.empty(3).double(), torch.empty(3).long()))[0],
    "add(alpha=)": lambda x, s: torch.add(x, W, alpha=s),
    "add(alpha=) of itself": lambda x, s: torch.add(s, W, alpha=s),
    "full of others": lambda x, s: W.new_full((5, 3), s) + torch.full_like(W, s),
    "add(alpha=) of others": lambda x, s: torch.add(W, W, alpha=s),
    "leaky_relu slope": lambda x, s: F.leaky_relu(x, s),
    "leaky_relu slope of another": lambda x, s: F.leaky_relu(W, negative_slope=s),
    "elu alpha": lambda x, s: F.elu(W, s),
    "pad(value=)": lambda x, s: F.pad(x, (1, 1), value=s),
    "pad(value=) of another": lambda x, s: F.pad(W, (1, 1), value=s),
    "addmm(beta=)": lambda x, s: torch.addmm(W, W, torch.eye(3).double(), beta=s),
    "norm(p)": lambda x, s: W.norm(s),
    "layer_norm(eps=)": lambda x, s: F.layer_norm(x, (3,), eps=s),
    "scaled_dot_product_attention(scale=)": lambda x, s: F.scaled_dot_product_attention(x, x, x, scale=s),
    "normal": lambda x, s: torch.normal(x, 1.0),
    "item": lambda x, s: W * s.item(),
    "float": lambda x, s: W * float(s),
    "math": lambda x, s: W * math.sin(s),
    "numpy": lambda x, s: torch.from_numpy(numpy.sin(x)),
    "numpy.asarray": lambda x, s: torch.from_numpy(numpy.asarray(x)),
    "numpy of a list": lambda x, s: torch.from_numpy(numpy.array([s, s])),
    "tolist": lambda x, s: torch.tensor(x.tolist()),
    "deepcopy": lambda x, s: copy.deepcopy(x),
    "copy": lambda x, s: copy.copy(x),
    "pickle": lambda x, s: pickle.loads(pickle.dumps(x)),
    "save": lambda x, s: torch.load(written(io.BytesIO, lambda f: (torch.save(x, f), f.seek(0)))),
    "DLPack": lambda x, s: torch.from_dlpack(x),
    "DLPack's capsule": lambda x, s: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
    "numpy by DLPack": lambda x, s: torch.from_numpy(numpy.from_dlpack(x)),
    "bits": lambda x, s: x.view(torch.int64).view(torch.float64),
    "bits by an operator": lambda x, s: torch.ops.aten.view.dtype(x, torch.int64).view(torch.float64),
    "storage": lambda x, s: torch.tensor(x.untyped_storage().tolist()),
    "typed storage": lambda x, s: torch.tensor(x._typed_storage()),
    "written through detach": lambda x, s: (lambda y: (y.detach().mul_(2), y)[1])(x * 1).sin(),
    "written through a view": lambda x, s: (lambda y: (y.detach()[:2].zero_(), y)[1])(x * 1).sin(),
    "an autograd.Function that holds it": lambda x, s: Held.apply(W.clone(), Hold([x])),
    "cond": lambda x, s: torch.ops.higher_order.cond(torch.tensor(True), torch.sin, torch.cos, (x,))[0],
    "unique": lambda x, s: x.unique(),
    "bincount": lambda x, s: torch.bincount(torch.tensor([0, 1, 1, 2, 0]), x[:, 0]),
}


def given():
    generator = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    return x, v


def case(function):
    """The function of x alone, its random draws repeated."""

    def of(x):
        torch.manual_seed(0)
        return function(x, x[1, 1])

    return of


def difference(function, x, v, h=1e-6):
    return (function(x + h * v) - function(x - h * v)) / (2 * h)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_is_followed(name):
    function, (x, v) = case(FOLLOWED[name]), given()
    value, rate = dual_forward(function, (x,), (v,))
    torch.testing.assert_close(value, function(x), rtol=0, atol=0)
    torch.testing.assert_close(rate, difference(function, x, v), rtol=1e-6, atol=1e-8)
    some = torch.cat([v[:2], torch.zeros(3, 3, dtype=torch.float64)])
    torch.testing.assert_close(
        dual_forward(function, (x,), (v[:2],))[1], dual_forward(function, (x,), (some,))[1], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("rows", [5, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name, rows):
    x, v = given()
    with pytest.raises(NotImplementedError):
        dual_forward(case(REFUSED[name]), (x,), (v[:rows],))


def replaced():
    """What the dual forward patches in torch."""
    return [
        getattr(owner, name) for owner, name in [*HIDDEN, (torch.jit.ScriptFunction, "__call__")]
    ], "data" in Tensor.__dict__


def test_torch_is_left_as_it_was_found():
    before, (x, v) = replaced(), given()
    dual_forward(torch.sin, (x,), (v,))
    with pytest.raises(NotImplementedError):
        dual_forward(lambda x: x.item(), (x,), (v,))
    assert replaced() == before and not before[1]


def test_one_tensor_may_have_two_tangents():
    x, v = given()
    torch.testing.assert_close(dual_forward(torch.mul, (x, x), (v, 2 * v))[1], 3 * x * v)
    torch.testing.assert_close(dual_forward(lambda a, b: a * b.sin(), (x, x), (v, None))[1], v * x.sin())


def test_running_statistics_are_kept_once():
    x, v = given()
    for layer in (
        torch.nn.BatchNorm1d(3, dtype=torch.float64),
        torch.nn.InstanceNorm1d(3, track_running_stats=True, dtype=torch.float64),
    ):
        plain = copy.deepcopy(layer)
        transposed = "Instance" in repr(layer)
        dual_forward(lambda x: F.softplus(layer(x.T[None] if transposed else x)), (x,), (v,))  # noqa: B023
        plain(x.T[None] if "Instance" in repr(layer) else x)
        assert torch.equal(layer.running_mean, plain.running_mean) and torch.equal(layer.running_var, plain.running_var)


def test_the_error_names_the_operation():
    x, v = given()
    for function, words in (
        (lambda x: torch.func.vmap(torch.sin)(x), "aten.sin.*inside torch.func"),
        (lambda x: torch.func.vmap(lambda a: a * x)(torch.ones(2, 1, 1)), "mul inside torch.func.vmap"),
        (lambda x: torch.add(x, 1, alpha=x[0, 0]), "torch.add.*a number"),
        (lambda x: x.unique(), "no tangent rule for"),
        (lambda x: torch.autograd.functional.vjp(torch.sin, x, x), "torch.autograd.functional.vjp"),
        (lambda x: torch.hash_tensor(x), "hash_tensor"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            dual_forward(function, (x,), (v,))


def test_a_finished_dual_forward_refuses_nothing():
    x, v = given()
    kept = []
    dual_forward(lambda x: kept.append(x * 2) or x, (x,), (v,))
    y = kept[0]
    assert type(y) is DualTensor
    for out in (
        copy.deepcopy(y),
        y.as_subclass(Tensor),
        torch.as_tensor(y, dtype=torch.float32),
        torch.func.vmap(torch.sin)(y),
    ):
        assert type(out) is Tensor and out.shape == y.shape
    assert y[0, 0].item() == 2 * x[0, 0]


INFINITE = {
    "clamp": lambda x: x.clamp(max=3.0),
    "clamp below": lambda x: -(-x).clamp(min=-3.0),
    "clip by a tensor": lambda x: x.clip(max=torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)),
    "clamp_max": lambda x: x.clamp_max(3.0),
    "clamp_min": lambda x: -(-x).clamp_min(-3.0),
    "minimum": lambda x: torch.minimum(x, torch.tensor(3.0).double()),
    "maximum": lambda x: -torch.maximum(torch.tensor(-3.0).double(), -x),
    "where": lambda x: torch.where(x < 3, x, 3.0),
    "masked_fill": lambda x: x.masked_fill(x > 3, 3.0),
    "nan_to_num": lambda x: x.nan_to_num(posinf=3.0),
    "hardtanh": lambda x: F.hardtanh(x, -3.0, 3.0),
    "relu6": lambda x: F.relu6(x),
    "relu": lambda x: 3 - F.relu(3 - x),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardswish": lambda x: F.hardswish(-x),
    "threshold": lambda x: F.threshold(-x, -3.0, 0.0),
    "min": lambda x: torch.stack([x, torch.full_like(x, 3.0)]).min(0)[0],
    "amin": lambda x: torch.stack([x, torch.full_like(x, 3.0)]).amin(0),
    "fmin": lambda x: torch.fmin(x, torch.tensor(3.0).double()),
    "fmax": lambda x: -torch.fmax(torch.tensor(-3.0).double(), -x),
}


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("name", INFINITE)
def test_where_an_infinite_value_is_cut_off_the_tangent_is_zero(name, rows):
    """The log of a ratio of noise to data is infinite, with its slope, at t = 1 (zero terminal SNR), and clamped."""
    t = torch.tensor([[0.5, 1.0, 0.5], [1.0, 0.6, 0.7]], dtype=torch.float64)
    _, rate = dual_forward(lambda t: INFINITE[name](torch.logit(t)), (t,), (torch.ones_like(t)[:rows],))
    assert rate.isfinite().all() and rate[0, 1] == 0 and rate[1, 0] == 0


KINKS = {
    "clamp": (lambda x: x.clamp(0.0, 1.0), [0.0, 1.0], [1.0, 1.0]),
    "clamp to tensors": (lambda x: x.clamp(torch.zeros_like(x), torch.ones_like(x)), [0.0, 1.0], [1.0, 1.0]),
    "clamp to one tensor": (lambda x: x.clamp(max=torch.zeros_like(x)), [0.0], [0.0]),
    "relu": (F.relu, [0.0], [0.0]),
    "abs": (torch.abs, [0.0], [0.0]),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), [0.0], [0.5]),
    "minimum": (lambda x: torch.minimum(x, torch.zeros_like(x)), [0.0], [0.5]),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), [0.0], [0.0]),
    "norm": (lambda x: x.norm(dim=-1, keepdim=True), [0.0], [0.0]),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), [0.0], [0.1]),
}


@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink_the_tangent_is_torchs_own(name):
    function, at, slope = KINKS[name]
    x = torch.tensor(at, dtype=torch.float64)
    rate = dual_forward(function, (x,), (torch.ones_like(x),))[1]
    assert rate.tolist() == slope
    torch.testing.assert_close(rate, torch.func.jvp(function, (x,), (torch.ones_like(x),))[1])


BY_ROWS = {
    "chunk": lambda x: x.chunk(chunks=2, dim=1)[0],
    "split": lambda x: x.split(split_size=1, dim=2)[0] + x.split(1, dim=-1)[1],
    "unbind": lambda x: x.unbind(dim=1)[1] + torch.unbind(x, axis=1)[0],
    "select": lambda x: x.select(dim=1, index=0),
    "conv1d": lambda x: F.conv1d(x, weight=torch.ones(2, 3, 2).double()),
    "conv1d, all by keywords": lambda x: F.conv1d(
        input=x, weight=torch.ones(2, 3, 2).double(), bias=torch.ones(2).double()
    ),
    "layer_norm": lambda x: F.layer_norm(x, normalized_shape=(4,)) + F.rms_norm(input=x, normalized_shape=(4,)),
    "softmax": lambda x: x.softmax(dim=-1) + torch.softmax(input=x, dim=1) + x.softmax(axis=2),
    "transpose": lambda x: x.transpose(dim0=1, dim1=2) + x.swapaxes(axis0=0, axis1=1).permute(dims=(1, 2, 0)),
    "cat": lambda x: torch.cat(tensors=[x, x.sin()], dim=1) + torch.cat([x, x], axis=1),
    "linear": lambda x: F.linear(x, weight=torch.ones(2, 4).double()),
    "reshape": lambda x: x.reshape(shape=(5, 12)) + x.view(size=(5, 12)),
    "group_norm": lambda x: F.group_norm(x, num_groups=3),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "matmul": lambda x: torch.matmul(input=x, other=torch.ones(4, 2).double()),
    "separated indices": lambda x: x[:, torch.tensor([0, 2]), None, torch.tensor([1, 3])],
    "separated lists": lambda x: x[:, None][:, [0, 0], :, [1, 3]],
    "neighbouring indices": lambda x: x[:, torch.tensor([0, 2]), torch.tensor([1, 3])],
    "an index and a number": lambda x: x[:, torch.tensor([0, 2]), 1],
    "a mask": lambda x: x[:, torch.ones(3, 4).bool()],
    "attention": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_a_tangent_of_some_rows_goes_the_same_way_by_keywords(name):
    x, v = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = torch.cat([v[:2], torch.zeros_like(v[2:])])
    rate = dual_forward(BY_ROWS[name], (x,), (v[:2],))[1]
    torch.testing.assert_close(rate, difference(BY_ROWS[name], x, full), rtol=1e-6, atol=1e-8)


def test_the_derivative_of_a_clamped_log_ratio_is_that_of_a_difference():
    """derivative.py's contract with t = 1 in the batch."""
    t = torch.tensor([0.3, 1.0, 0.9999999], dtype=torch.float64)
    rate = value_and_rate(lambda t: torch.logit(t).clamp(max=10.0), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(rate, torch.tensor([1 / 0.21, 0.0, 0.0], dtype=torch.float64))
