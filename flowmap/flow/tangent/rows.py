"""Tangents of the first rows of a batch only, for batches in which some samples need no derivative: those cost nothing.

Such a tangent is shorter in one dimension, described by `Rows`. If an operation treats rows independently (elementwise,
on the last dimensions, a reshape or permutation around them), its rule gets only those rows of its arguments. For any
other operation the tangent is first padded with zeros. Both are exact.
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
    """The tangent covers the first `count` entries of dimension `dim`, a negative index."""

    dim: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls


def partial(duals) -> bool:
    """Whether one of these dual tensors has a tangent of some rows only."""
    return any(x.rows is not None for x in duals)


def size_of(value: Tensor, rows: Rows | None) -> torch.Size:
    """The shape of the tangent of these rows of a value, or of all (None)."""
    shape = value.shape
    if rows is None:
        return shape
    return torch.Size([*shape[: rows.dim], rows.count, *shape[len(shape) + rows.dim + 1 :]])


def filled(x) -> Tensor:
    """The tangent of a dual tensor, padded with zeros to the value's shape."""
    return x.tangent if x.rows is None else whole(x)


def whole(x) -> Tensor:
    """The tangent of some rows, padded with zeros."""
    missing = list(x.value.shape)
    missing[x.rows.dim] -= x.rows.count
    return torch.cat([x.tangent, x.tangent.new_zeros(missing)], x.rows.dim)


def mapped(x, change: Callable):
    """x with `change` applied to every tensor, also inside lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return change(x)
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(v, change) for v in x])
    return {key: mapped(v, change) for key, v in x.items()} if kind is dict else x


def rows_of(function: Callable, out, x, args: tuple) -> Rows | None:
    """The rows of out = function(*args) that depend on the rows with a tangent of x, the only dual argument.

    None if the operation is not known to treat rows independently. args are values.
    """
    kind = KINDS.get(function)
    if kind is None or not accepts(kind, len(args), ()):
        return None
    dim = kind(x.rows.dim, out, *args)
    return None if dim is None else x.rows if dim == x.rows.dim else Rows(dim, x.rows.count)


def apart(function: Callable, out, args: tuple, kwargs: dict, duals: list):
    """(out, args, kwargs, tangents by id, rows of out): the call restricted to the rows with a tangent, for a rule.

    None if the operation is not known to treat rows independently. args and kwargs are values.
    """
    rows, kind = duals[0].rows, KINDS.get(function)
    if kind is None or rows is None or not args and kind not in ALIGNED or not accepts(kind, len(args), tuple(kwargs)):
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


def first(rows: Rows, size: int, duals: dict[int, Tensor], tangents: dict[int, Tensor], x: Tensor) -> Tensor:
    """The first rows of a dual tensor's value, recorded in `tangents`, or of a constant with a batch of this size."""
    tangent = duals.get(id(x))
    if tangent is None:
        return x.narrow(rows.dim, 0, rows.count) if x.ndim >= -rows.dim and x.shape[rows.dim] == size else x
    y = x.narrow(rows.dim, 0, rows.count)
    tangents[id(y)] = tangent
    return y


def by_element(dim, out, /, *args, **kwargs):
    """Elementwise operations with broadcasting."""
    return dim if isinstance(out, Tensor) else None


def by_matrix(dim, out, /, *args, **kwargs):
    """Matrix products and attention on the last two dimensions, the last three if heads share keys."""
    least = 3 if kwargs.get("enable_gqa") else 2
    return dim if dim < -least and all(x.ndim > 1 for x in args if isinstance(x, Tensor)) else None


def by_vector(dim, out, x, /, *args, **kwargs):
    """Operations on the last dimension."""
    return dim if dim < -1 else None


def by_normalised(dim, out, x, normalized_shape, *args, **kwargs):
    """Normalisation over the last dimensions."""
    return dim if dim < -len(normalized_shape) else None


def by_sample(dim, out, x, /, *args, **kwargs):
    """Convolutions and group norms: operations on samples, with the batch in the first dimension."""
    return dim if dim == -x.ndim and out.ndim == x.ndim and x.ndim > 2 else None


def convolved(dim, out, x, weight, *args, **kwargs):
    """A convolution of a batch."""
    return by_sample(dim, out, x) if x.ndim == weight.ndim else None


def over_one_dimension(row, out, x, dim=None, *args, **kwargs):
    """softmax over any dimension except that of the rows."""
    return None if dim is None or dim % x.ndim == row % x.ndim else row


def reshaped(dim, out, x, /, *args, **kwargs):
    """Reshapes that keep the dimension of the rows and those before it."""
    kept = x.ndim + dim + 1
    return kept - 1 - out.ndim if x.shape[:kept] == out.shape[:kept] else None


def permuted(dim, out, x, /, *dims, **kwargs):
    """permute: the dimension of the rows moves."""
    dims = kwargs.get("dims", dims)
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [i % x.ndim for i in dims].index(dim % x.ndim) - x.ndim


def transposed(dim, out, x, *dims, **kwargs):
    """transpose: two dimensions are exchanged, named dim0 and dim1 or axis0 and axis1."""
    a, b = (i % x.ndim for i in (*dims, *(kwargs[key] for key in sorted(kwargs))))
    swap = {a: b, b: a}
    return swap.get(dim % x.ndim, dim % x.ndim) - x.ndim


def mirrored(dim, out, x):
    """mT: the last two dimensions are exchanged."""
    return dim if dim < -2 else None


def split(row, out, x, sizes=None, dim=0, **kwargs):
    """chunk and split, over any dimension except that of the rows."""
    return None if dim % x.ndim == row % x.ndim else row


def unbound(row, out, x, dim=0, *args, **kwargs):
    """unbind and select: any dimension except that of the rows is removed."""
    dim = dim % x.ndim
    return None if dim == row % x.ndim else row + (dim > row % x.ndim)


def picked(dim, out, x, index):
    """x[:, ...]: any indexing that keeps all rows, in the first dimension of both x and out.

    Index arrays that are not adjacent put their common dimensions first: x[:, i, :, j] moves the rows.
    """
    index = index if isinstance(index, tuple) else (index,)
    if dim != -x.ndim or not isinstance(index[0], slice) or index[0] != slice(None):
        return None
    arrays = [i for i, v in enumerate(index) if not (v is None or v is Ellipsis or isinstance(v, (int, slice)))]
    return -out.ndim if not arrays or arrays[-1] - arrays[0] + 1 == len(arrays) else None


def joined(row, out, tensors, dim=0):
    """cat over any dimension except that of the rows, of tensors that all have those rows."""
    return None if dim % out.ndim == row % out.ndim or any(x.ndim != out.ndim for x in tensors) else row


def stacked(row, out, tensors, dim=0):
    """stack: a new dimension, before or behind that of the rows."""
    return row if dim % out.ndim < out.ndim + row else row - 1


def expanded(row, out, x, *args, **kwargs):
    """expand: the rows keep their dimension and their number."""
    return row if out.shape[row] == x.shape[row] else None


def repeated(row, out, x, *sizes, **kwargs):
    """repeat and tile over any dimension except that of the rows."""
    sizes = sizes[0] if sizes and not isinstance(sizes[0], int) else sizes
    return row if not kwargs and sizes and (len(sizes) < -row or sizes[row] == 1) else None


def reduced(row, out, x, dim=None, keepdim=False, **kwargs):
    """sum, mean and the like over dimensions except that of the rows."""
    dims = {i % x.ndim for i in ((dim,) if isinstance(dim, int) else dim or ())}
    place = x.ndim + row
    if not dims or place in dims or not isinstance(keepdim, bool):
        return None
    return row if keepdim else row + sum(i > place for i in dims)


def norm_reduced(row, out, x, ord=None, dim=None, keepdim=False, **kwargs):
    """Norms over dimensions except that of the rows."""
    return reduced(row, out, x, dim, keepdim)


def normalised(row, out, x, p=2.0, dim=1, *args, **kwargs):
    """normalize over any dimension except that of the rows."""
    return over_one_dimension(row, out, x, dim) if isinstance(dim, int) else None


def padded(row, out, x, pad, *args, **kwargs):
    """pad of dimensions behind that of the rows."""
    return row if -row > len(pad) // 2 else None


def summed(row, out, equation, x):
    """einsum of one tensor that keeps the rows' letter."""
    if not isinstance(equation, str) or not isinstance(x, Tensor):
        return None
    given, arrow, kept = equation.replace(" ", "").partition("->")
    letter = given[row] if len(given) == x.ndim else "."
    return kept.index(letter) - len(kept) if arrow and kept.isalpha() and kept.count(letter) == 1 else None


def complex_from_real(row, out, x):
    """view_as_complex: the last dimension is removed."""
    return row + 1 if row < -1 else None


def real_from_complex(row, out, x):
    """view_as_real: a last dimension is added."""
    return row - 1


ALIGNED = (by_element, by_matrix, joined, stacked, summed)
"""Kinds that narrow all arguments to the rows; the others narrow their first argument, the only dual one."""

KINDS: dict[Callable, Callable] = {
    **{function: by_element for function, rule in ELEMENTWISE.items() if rule is not constant},
    **every(by_element, "to", "float", "double", "half", "bfloat16", "clone", "type_as"),
    F.dropout: by_element,
    **every(by_matrix, "matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention"),
    **every(by_vector, "linear"),
    **every(by_normalised, "layer_norm", "rms_norm"),
    **every(by_sample, "group_norm", "interpolate", "pixel_shuffle", "pixel_unshuffle", "avg_pool2d"),
    **every(convolved, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    **every(over_one_dimension, "softmax", "log_softmax", "cumsum", "narrow", "index_select"),
    **every(reduced, "sum", "mean", "logsumexp"),
    **every(norm_reduced, "norm", "vector_norm"),
    F.normalize: normalised,
    **every(padded, "pad"),
    torch._C._nn.pad: padded,
    **every(summed, "einsum"),
    **every(expanded, "expand", "broadcast_to", "expand_as"),
    **every(repeated, "repeat", "tile"),
    **every(reshaped, *RESHAPES),
    **every(permuted, "permute"),
    **every(transposed, "transpose", "swapaxes", "swapdims"),
    **getters(mirrored, "mT"),
    **every(split, "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk"),
    **every(unbound, "unbind", "select"),
    **every(picked, "__getitem__"),
    **every(joined, "cat", "concat", "concatenate"),
    **every(complex_from_real, "view_as_complex"),
    **every(real_from_complex, "view_as_real"),
    **every(stacked, "stack"),
}
