"""Tangent rules of matrix products, convolutions, normalisation and attention, which take most of the time.

Softmax and normalisation without weights have symmetric Jacobians, so their fused backward kernels also compute the
forward derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap.flow.tangent.attention import attention_tangent
from flowmap.flow.tangent.rules_base import Rule, T, add_up, every, multilinear

aten = torch.ops.aten


def linear_layer(op, out, x, weight, bias=None):
    """d(x W' + b); one product if only x has a tangent."""
    tx, tweight, tbias = T(x), T(weight), T(bias)
    if tweight is None and tbias is None:
        return F.linear(tx, weight)
    return add_up(
        None if tx is None else F.linear(tx, weight), None if tweight is None else F.linear(x, tweight), tbias
    )


def convolution(op, out, x, weight, bias=None, *args, **kwargs):
    """d conv(x, w) + db; the bias is added to the channels (dimension 1 of a batch)."""
    through_x = None if T(x) is None else op(T(x), weight, None, *args, **kwargs)
    through_weight = None if T(weight) is None else op(x, T(weight), None, *args, **kwargs)
    spatial = weight.ndim - 2
    return add_up(through_x, through_weight, None if T(bias) is None else T(bias).view(-1, *[1] * spatial))


def einsum(op, out, equation, *operands):
    """Linear in each operand."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    return multilinear(op, out, equation, *given)


def reversed_matmul(op, out, b, a):
    """d(a b), written b.__rmatmul__(a)."""
    return multilinear(torch.matmul, out, a, b)


def add_matmul(op, out, x, a, b, *, beta=1, alpha=1):
    """addmm, baddbmm: d(beta x + alpha a b)."""
    first = None if T(x) is None else T(x) * beta
    return add_up(
        first,
        None if T(a) is None else op(x, T(a), b, beta=0, alpha=alpha),
        None if T(b) is None else op(x, a, T(b), beta=0, alpha=alpha),
    )


def softmax(op, out, x, dim=None, *args, **kwargs):
    """w (dx - sum w dx)."""
    if dim is None:
        return NotImplemented
    return torch._softmax_backward_data(T(x).to(out.dtype), out, dim, out.dtype)


def log_softmax(op, out, x, dim=None, *args, **kwargs):
    """dx - sum w dx."""
    if dim is None:
        return NotImplemented
    t = T(x).to(out.dtype)
    return t - (out.exp() * t).sum(dim, keepdim=True)


def logsumexp(op, out, x, dim, keepdim=False):
    """sum w dx."""
    return (torch.softmax(x, dim) * T(x)).sum(dim, keepdim=keepdim) if isinstance(dim, int) else NotImplemented


def vector_norm(op, out, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """sum Re(conj(x) dx) / |x|, 0 at 0, for the Euclidean norm; others are left to torch."""
    if isinstance(ord, Tensor) or ord != 2 or dtype is not None:
        return NotImplemented
    inner = (x.conj() * T(x)).real if x.is_complex() else x * T(x)
    dims = tuple(range(x.ndim)) if dim is None else dim
    return (inner.sum(dims, keepdim=keepdim) / out).masked_fill(out == 0, 0)


def norm(op, out, x, p="fro", dim=None, keepdim=False, dtype=None):
    """torch.norm, for which "fro" and 2 are Euclidean."""
    return vector_norm(op, out, x, 2, dim, keepdim, dtype=dtype) if p in ("fro", None) or p == 2 else NotImplemented


def norm_of_either(op, out, x, ord=None, dim=None, keepdim=False, *, dtype=None):
    """torch.linalg.norm, Euclidean without `ord`; ord=2 of a matrix is another norm."""
    return vector_norm(op, out, x, 2, dim, keepdim, dtype=dtype) if ord is None else NotImplemented


def normalize(op, out, x, p=2.0, dim=1, eps=1e-12):
    """x / max(|x|, eps): (dx - y Re(conj(y) dx)) / |x|, or dx / eps if |x| < eps."""
    if p != 2 or x.is_complex():
        return NotImplemented
    size, t = torch.linalg.vector_norm(x, dim=dim, keepdim=True), T(x)
    radial = (out * t).sum(dim, keepdim=True).masked_fill(size < eps, 0)
    return (t - out * radial) / size.clamp_min(eps)


def layer_norm(op, out, x, normalized_shape, weight=None, bias=None, eps=1e-5, *unused):
    """weight J dx, with J the symmetric Jacobian of the normalisation; dual weights are left to torch."""
    if T(x) is None or T(weight) is not None or T(bias) is not None:
        return NotImplemented
    x, t, shape = x.to(out.dtype), T(x).to(out.dtype), list(normalized_shape)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    d = aten.native_layer_norm_backward(t, x, shape, mean, rstd, None, None, [True, False, False])[0]
    return d if weight is None else d * weight


def rms_norm(op, out, x, normalized_shape, weight=None, eps=None):
    """weight r (dx - x r^2 mean(x dx)), r = 1 / sqrt(mean x^2 + eps)."""
    if T(x) is None or T(weight) is not None:
        return NotImplemented
    wide = torch.promote_types(x.dtype, torch.float32)
    x, t, dims = x.to(wide), T(x).to(wide), tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(out.dtype).eps if eps is None else eps
    r2 = x.square().mean(dims, keepdim=True).add_(eps).reciprocal_()
    d = torch.addcmul(t, x, (x * t).mean(dims, keepdim=True).mul_(r2), value=-1).mul_(r2.sqrt())
    return d if weight is None else d * weight


def group_norm(op, out, x, num_groups, weight=None, bias=None, eps=1e-5, *unused):
    """weight J dx, group by group; dual weights are left to torch."""
    if T(x) is None or T(weight) is not None or T(bias) is not None:
        return NotImplemented
    x, t = x.to(out.dtype).contiguous(), T(x).to(out.dtype).contiguous()
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), num_groups)
    _, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
    d = aten.native_group_norm_backward(t, x, mean, rstd, None, *sizes, [True, False, False])[0]
    return d if weight is None else d * weight.view(-1, *[1] * (x.ndim - 2))


def batch_norm(
    op, out, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *unused
):
    """With running statistics a scale per channel, with batch statistics layer normalisation over the batch."""
    if T(x) is None or any(T(v) is not None for v in (running_mean, running_var, weight, bias)):
        return NotImplemented
    channels = (-1, *[1] * (x.ndim - 2))
    scale = 1 if weight is None else weight.view(channels)
    if not training:
        return T(x) * (scale * torch.rsqrt(running_var + eps).view(channels))
    columns, t = (v.transpose(0, 1).flatten(1) for v in (x, T(x)))
    _, mean, rstd = torch.native_layer_norm(columns.contiguous(), [columns.shape[1]], None, None, eps)
    y = (columns - mean) * rstd
    d = rstd * (t - t.mean(1, keepdim=True) - y * (y * t).mean(1, keepdim=True))
    return d.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1) * scale


def dropout(op, out, x, p=0.5, training=True, inplace=False):
    """Without randomness the tangent passes through; `carry` handles random dropout by torch's forward derivative."""
    assert not training or p == 0
    return T(x)


def attention(op, out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """(w ds) v - rowsum(w ds) out + w dv (attention.py). Raises for dropout."""
    if dropout_p:
        raise NotImplementedError(
            "no tangent through scaled_dot_product_attention with dropout_p > 0: set the dropout to 0"
        )
    named = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return attention_tangent(out, query, key, value, (T(query), T(key), T(value), T(attn_mask)), **named)


NN: dict[Callable, Rule] = {
    **every(linear_layer, "linear"),
    **every(convolution, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    **every(einsum, "einsum"),
    **every(multilinear, "matmul", "__matmul__", "mm", "bmm", "mv", "dot", "inner", "outer", "vecdot"),
    **every(reversed_matmul, "__rmatmul__"),
    **every(add_matmul, "addmm", "baddbmm"),
    **every(softmax, "softmax"),
    **every(log_softmax, "log_softmax"),
    **every(logsumexp, "logsumexp"),
    torch.linalg.vector_norm: vector_norm,
    torch.norm: norm,
    Tensor.norm: norm,
    torch.linalg.norm: norm_of_either,
    F.normalize: normalize,
    **every(layer_norm, "layer_norm"),
    **every(rms_norm, "rms_norm"),
    **every(group_norm, "group_norm"),
    F.batch_norm: batch_norm,
    F.dropout: dropout,
    **every(attention, "scaled_dot_product_attention"),
}
