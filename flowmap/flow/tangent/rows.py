"""A tangent of the first rows of a batch alone, for a batch of which some samples need no derivative: those cost no tangent at all.

Such a tangent is short in one dimension, `Rows`. An operation that keeps rows apart (elementwise, on the last dimensions, a reshape
or permutation around them) hands its rule those rows of its arguments; before any other the tangent is filled up with zeros. Both are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap.flow.tangent.rules_base import accepts, constant, every, getters
from flowmap.flow.tangent.rules_elementwise import ELEMENTWISE
from flowmap.flow.tangent.rules_shape import RESHAPES


class Rows(NamedTuple):
    """The tangent covers the first `count` places of dimension `dim`, which is negative: counted from the last."""

    dim: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls


def partial(duals) -> bool:
    """Whether one of these carries a tangent of some rows only."""
    return any(x.rows is not None for x in duals)


def filled(x) -> Tensor:
    """The tangent of what rides, whole."""
    return x.tangent if x.rows is None else whole(x)


def whole(x) -> Tensor:
    """The tangent of what rides, zero in the rows that were left out."""
    missing = list(x.value.shape)
    missing[x.rows.dim] -= x.rows.count
    return torch.cat([x.tangent, x.tangent.new_zeros(missing)], x.rows.dim)


def mapped(x, change: Callable):
    """x with every tensor in it changed; also inside lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return change(x)
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(v, change) for v in x])
    return {key: mapped(v, change) for key, v in x.items()} if kind is dict else x


def apart(function: Callable, out, args: tuple, kwargs: dict, duals: list):
    """(out, args, kwargs, tangents by id, rows) for a rule: the call on the rows that have a tangent, and the rows of what it gives; or None
    where the operation is not known to keep them apart. args and kwargs are values.
    """
    rows, kind = duals[0].rows, KINDS.get(function)
    if kind is None or not args or rows is None or not accepts(kind, len(args), tuple(kwargs)):
        return None
    for x in duals:
        if x.rows is not rows and x.rows != rows:
            return None
    dim = kind(rows.dim, out, *args, **kwargs)
    if dim is None:
        return None
    if kind in ALIGNED:
        tangents: dict[int, Tensor] = {}
        narrow = functools.partial(first, rows, out.shape[dim], {id(x.value): x.tangent for x in duals}, tangents)
        args, kwargs = mapped(args, narrow), mapped(kwargs, narrow) if kwargs else kwargs
    elif len(duals) == 1 and duals[0].value is args[0]:
        part = args[0].narrow(rows.dim, 0, rows.count)
        args, tangents = (part, *args[1:]), {id(part): duals[0].tangent}
    else:
        return None
    part = out.narrow(dim, 0, rows.count) if isinstance(out, Tensor) else out
    return part, args, kwargs, tangents, rows if dim == rows.dim else Rows(dim, rows.count)


def first(rows: Rows, size: int, riding: dict[int, Tensor], tangents: dict[int, Tensor], x: Tensor) -> Tensor:
    """The rows of what rides, noted in tangents, or of a constant that broadcasts against a batch of this size."""
    tangent = riding.get(id(x))
    if tangent is None:
        return x.narrow(rows.dim, 0, rows.count) if x.ndim >= -rows.dim and x.shape[rows.dim] == size else x
    y = x.narrow(rows.dim, 0, rows.count)
    tangents[id(y)] = tangent
    return y


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


def by_normalised(dim, out, x, normalized_shape, *args, **kwargs):
    """A norm over the last dimensions."""
    return dim if dim < -len(normalized_shape) else None


def by_sample(dim, out, x, /, *args, **kwargs):
    """Convolutions and group norms: any operation on samples that lie along the first dimension."""
    return dim if dim == -x.ndim and out.ndim == x.ndim and x.ndim > 2 else None


def convolved(dim, out, x, weight, *args, **kwargs):
    """A convolution of a batch."""
    return by_sample(dim, out, x) if x.ndim == weight.ndim else None


def along_a_dimension(row, out, x, dim=None, *args, **kwargs):
    """softmax: along any dimension but the rows'."""
    return None if dim is None or dim % x.ndim == row % x.ndim else row


def reshaped(dim, out, x, /, *args, **kwargs):
    """The rows' dimension and those before it stay."""
    kept = x.ndim + dim + 1
    return kept - 1 - out.ndim if x.shape[:kept] == out.shape[:kept] else None


def permuted(dim, out, x, /, *dims, **kwargs):
    """The rows' dimension goes where it is sent."""
    dims = kwargs.get("dims", dims)
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [i % x.ndim for i in dims].index(dim % x.ndim) - x.ndim


def transposed(dim, out, x, *dims, **kwargs):
    """Two dimensions change places, named dim0 and dim1 or axis0 and axis1."""
    a, b = (i % x.ndim for i in (*dims, *(kwargs[key] for key in sorted(kwargs))))
    swap = {a: b, b: a}
    return swap.get(dim % x.ndim, dim % x.ndim) - x.ndim


def mirrored(dim, out, x):
    """The last two change places."""
    return dim if dim < -2 else None


def split(row, out, x, sizes=None, dim=0, **kwargs):
    """chunk, split: along any dimension but the rows'."""
    return None if dim % x.ndim == row % x.ndim else row


def unbound(row, out, x, dim=0, *args, **kwargs):
    """unbind, select: a dimension other than the rows' goes away."""
    dim = dim % x.ndim
    return None if dim == row % x.ndim else row + (dim > row % x.ndim)


def picked(dim, out, x, index):
    """x[:, ...]: whatever happens behind the rows' dimension, if that is the first and stays whole and in front.

    Arrays of indices that are not neighbours put their common dimensions first: x[:, i, :, j] has the rows elsewhere.
    """
    index = index if isinstance(index, tuple) else (index,)
    if dim != -x.ndim or not isinstance(index[0], slice) or index[0] != slice(None):
        return None
    arrays = [i for i, v in enumerate(index) if not (v is None or v is Ellipsis or isinstance(v, (int, slice)))]
    return -out.ndim if not arrays or arrays[-1] - arrays[0] + 1 == len(arrays) else None


def joined(row, out, tensors, dim=0):
    """cat: along any dimension but the rows', of tensors that all have those rows."""
    return None if dim % out.ndim == row % out.ndim or any(x.ndim != out.ndim for x in tensors) else row


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
