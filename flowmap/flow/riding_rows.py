"""A tangent of the first rows of a batch alone, for a batch of which some samples need no derivative: those cost no tangent at all.

Such a tangent is short in one dimension, `Rows`. An operation that keeps rows apart (elementwise, on the last dimensions, a reshape
or permutation around them) hands its rule those rows of its arguments; before any other the tangent is filled up with zeros. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap.flow.rules_base import constant, every, getters
from flowmap.flow.rules_elementwise import ELEMENTWISE
from flowmap.flow.rules_shape import RESHAPES


class Rows(NamedTuple):
    """The tangent covers the first `count` places of dimension `dim`, which is negative: counted from the last."""

    dim: int
    count: int


def partial(riders) -> bool:
    """Whether one of these carries a tangent of some rows only."""
    return any(x.rows is not None for x in riders)


def filled(x):
    """x with every tangent in it whole: zero in the rows that were left out; also inside lists, tuples and dicts."""
    return mapped(x, lambda x: whole(x) if getattr(x, "rows", None) else x)


def mapped(x, change: Callable):
    """x with every tensor in it changed; also inside lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return change(x)
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(v, change) for v in x])
    return {key: mapped(v, change) for key, v in x.items()} if kind is dict else x


def whole(x: Tensor) -> Tensor:
    """One riding tensor with its tangent filled up."""
    missing = list(x.value.shape)
    missing[x.rows.dim] -= x.rows.count
    y = x.value.as_subclass(type(x))
    y.value, y.ride, y.rows = x.value, x.ride, None
    y.tangent = torch.cat([x.tangent, x.tangent.new_zeros(missing)], x.rows.dim)
    return y


def apart(function: Callable, out, args: tuple, kwargs: dict, riders: list):
    """(out, args, kwargs, rows) for a rule: the call on the rows that have a tangent, and the rows of what it gives; or None.

    What rides among the arguments comes as an ordinary tensor with a tangent, which is all that a rule looks at.
    """
    rows, kind = riders[0].rows, KINDS.get(function)
    if kind is None or not args or any(x.rows != rows for x in riders):
        return None
    dim = kind(rows.dim, out, *args, **kwargs)
    if dim is None:
        return None
    if kind in ALIGNED:
        size = out.shape[dim]
        args, kwargs = mapped(args, lambda x: first(x, rows, size)), mapped(kwargs, lambda x: first(x, rows, size))
    elif len(riders) == 1 and riders[0] is args[0]:
        args = (first(args[0], rows), *args[1:])
    else:
        return None
    part = out.narrow(dim, 0, rows.count) if isinstance(out, Tensor) else out
    return part, args, kwargs, rows if dim == rows.dim else Rows(dim, rows.count)


def first(x: Tensor, rows: Rows, size: int = 0) -> Tensor:
    """The rows of what rides, or of a constant that broadcasts against a batch of this size."""
    tangent = getattr(x, "tangent", None)
    if tangent is not None:
        y = x.value.narrow(rows.dim, 0, rows.count)
        y.tangent = tangent
        return y
    return x.narrow(rows.dim, 0, rows.count) if x.ndim >= -rows.dim and x.shape[rows.dim] == size else x


def by_element(dim, out, /, *args, **kwargs):
    """Arguments broadcast against each other."""
    return dim if isinstance(out, Tensor) else None


def by_matrix(dim, out, /, *args, **kwargs):
    """Products and attention on the last two dimensions; on the last three where heads share keys."""
    least = 3 if kwargs.get("enable_gqa") else 2
    return dim if dim < -least and all(x.ndim > 1 for x in args if isinstance(x, Tensor)) else None


def by_vector(dim, out, x, /, *args, **kwargs):
    """A map of the last dimension."""
    return dim if dim < -1 else None


def by_normalised(dim, out, x, shape, /, *args, **kwargs):
    """A norm over the last dimensions."""
    return dim if dim < -len(shape) else None


def by_sample(dim, out, x, /, *args, **kwargs):
    """Convolutions and group norms: any operation on samples that lie along the first dimension."""
    return dim if dim == -x.ndim and out.ndim == x.ndim and x.ndim > 2 else None


def convolved(dim, out, x, weight, /, *args, **kwargs):
    """A convolution of a batch."""
    return by_sample(dim, out, x) if x.ndim == weight.ndim else None


def along_a_dimension(dim, out, x, along=None, /, *args, **kwargs):
    """softmax: along any dimension but the rows'."""
    along = kwargs.get("dim", along)
    return None if along is None or along % x.ndim == dim % x.ndim else dim


def reshaped(dim, out, x, /, *args, **kwargs):
    """The rows' dimension and those before it stay."""
    kept = x.ndim + dim + 1
    return kept - 1 - out.ndim if x.shape[:kept] == out.shape[:kept] else None


def permuted(dim, out, x, /, *dims, **kwargs):
    """The rows' dimension goes where it is sent."""
    dims = kwargs.get("dims", dims)
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [i % x.ndim for i in dims].index(dim % x.ndim) - x.ndim


def transposed(dim, out, x, a=None, b=None, /, **kwargs):
    """Two dimensions change places."""
    if a is None or b is None:
        return None
    swap = {a % x.ndim: b % x.ndim, b % x.ndim: a % x.ndim}
    return swap.get(dim % x.ndim, dim % x.ndim) - x.ndim


def mirrored(dim, out, x):
    """The last two change places."""
    return dim if dim < -2 else None


def split(dim, out, x, sizes, along=0, /, **kwargs):
    """chunk, split: along any dimension but the rows'."""
    return None if kwargs.get("dim", along) % x.ndim == dim % x.ndim else dim


def unbound(dim, out, x, along=0, /, *args, **kwargs):
    """unbind, select: a dimension other than the rows' goes away."""
    along = kwargs.get("dim", along) % x.ndim
    return None if along == dim % x.ndim else dim + (along > dim % x.ndim)


def picked(dim, out, x, index):
    """x[:, ...]: whatever happens behind the rows' dimension, if that is the first and stays whole."""
    index = index if isinstance(index, tuple) else (index,)
    return -out.ndim if dim == -x.ndim and index[:1] == (slice(None),) else None


def joined(dim, out, tensors, along=0, /, **kwargs):
    """cat: along any dimension but the rows', of tensors that all have those rows."""
    along = kwargs.get("dim", along) % out.ndim
    return None if along == dim % out.ndim or any(x.ndim != out.ndim for x in tensors) else dim


ALIGNED = (by_element, by_matrix, joined)
"""Kinds whose other arguments are narrowed with the riding ones; the rest take rows of their first argument, the only one that rides."""

KINDS: dict[Callable, Callable] = {
    **{function: by_element for function, rule in ELEMENTWISE.items() if rule is not constant},
    **every(by_element, "to", "float", "double", "half", "bfloat16", "clone"),
    F.dropout: by_element,
    **every(by_matrix, "matmul", "__matmul__", "bmm", "scaled_dot_product_attention"),
    **every(by_vector, "linear"),
    **every(by_normalised, "layer_norm", "rms_norm"),
    **every(by_sample, "group_norm", "interpolate", "pixel_shuffle", "pixel_unshuffle", "avg_pool2d"),
    **every(convolved, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    **every(along_a_dimension, "softmax", "log_softmax"),
    **every(reshaped, *RESHAPES),
    **every(permuted, "permute"),
    **every(transposed, "transpose", "swapaxes", "swapdims"),
    **getters(mirrored, "mT"),
    **every(split, "chunk", "split"),
    **every(unbound, "unbind", "select"),
    **every(picked, "__getitem__"),
    **every(joined, "cat", "concat", "concatenate"),
}
