"""Tangent rules of operations that move, select, join or sum numbers: the same operation applies to the tangent."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flowmap.flow.tangent.rules_base import T, every, getters, linear, same, shaped_like, tangent_or_zero


def reshaped(op, out, x, *args, **kwargs):
    """The tangent in out's shape. Its memory layout may differ from the value's, so it is reshaped, never viewed."""
    T(args[0] if args else kwargs.get("other"))  # view_as and reshape_as use only its shape
    t = T(x)
    if t is None:
        return None
    if out.dtype != x.dtype:
        raise NotImplementedError(f"Tensor.view as {out.dtype}: the bits of {x.dtype} have no derivative")
    return t.reshape(out.shape)


def expanded(op, out, x, *args, **kwargs):
    """The tangent expanded to out's shape."""
    T(args[0] if args else kwargs.get("other"))  # expand_as uses only its shape
    t = T(x)
    return None if t is None else t.expand(out.shape)


def viewed_as_complex(op, out, x):
    return op(T(x).contiguous())


def joined(op, out, tensors, *args, **kwargs):
    """cat, stack and the like: tangents are joined as the values are."""
    return op([tangent_or_zero(x) for x in tensors], *args, **kwargs)


def broadcast(op, out, *tensors):
    """torch.broadcast_tensors."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    return tuple(None if T(x) is None else T(x).expand(o.shape) for x, o in zip(given, out, strict=True))


def padded(op, out, x, pad, mode="constant", value=None):
    """pad: the padding is constant, so its tangent is 0."""
    return F.pad(T(x), pad, mode)


def scattered(op, out, x, dim, index, src=None, *args, **kwargs):
    """scatter and scatter_add, linear in x and src together."""
    if args or kwargs or not isinstance(src, torch.Tensor):
        return NotImplemented
    return op(tangent_or_zero(x), dim, index, tangent_or_zero(src))


def extreme(op, out, x, *args, **kwargs):
    """max and min over a dimension: the tangent of the selected entry. Other forms are left to torch."""
    if not isinstance(out, tuple):
        return NotImplemented
    dim = args[0] if args else kwargs["dim"]
    keep = out[1].ndim == x.ndim
    index = out[1] if keep else out[1].unsqueeze(dim)
    picked = T(x).gather(dim, index)
    return (picked if keep else picked.squeeze(dim), None)


def iterated(op, out, x):
    """Iteration over the first dimension."""
    return tuple(T(x).unbind(0))


RESHAPES = "view reshape view_as reshape_as flatten unflatten ravel unsqueeze squeeze contiguous".split()
MOVES = (
    "permute transpose swapaxes swapdims movedim moveaxis t adjoint repeat tile repeat_interleave "
    "roll flip fliplr flipud rot90 chunk split split_with_sizes tensor_split unsafe_chunk unbind narrow select "
    "diagonal diag_embed tril triu unfold fold __getitem__ gather index_select take_along_dim masked_select "
    "sum mean cumsum trace "
    "float double half bfloat16 cpu cuda clone view_as_real conj resolve_conj resolve_neg real imag "
    "pixel_shuffle pixel_unshuffle channel_shuffle interpolate upsample avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
).split()

SHAPE = {
    **every(reshaped, *RESHAPES),
    **every(linear, *MOVES),
    **every(expanded, "expand", "broadcast_to", "expand_as"),
    **every(shaped_like, "type_as", "to"),
    **getters(linear, "mT", "T", "H", "mH", "real", "imag"),
    **every(viewed_as_complex, "view_as_complex"),
    **every(joined, "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
    **every(broadcast, "broadcast_tensors"),
    **every(padded, "pad"),
    torch._C._nn.pad: padded,  # as torch.compile captures it
    **every(scattered, "scatter", "scatter_add"),
    **every(extreme, "max", "min"),
    **every(iterated, "__iter__"),
    **every(same, "requires_grad_"),
}
