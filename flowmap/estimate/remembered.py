"""Kernels on the meta device whose results are known from an earlier call with arguments of the same shapes.

torch finds the shapes of many results in Python, in up to a millisecond. A network repeats its blocks, and an estimate
runs it several times, so that nearly every kernel is one that ran before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Outline = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and type of a tensor
UNKNOWN = object()

_MADE: dict[Any, bool] = {}  # whether a function's results are tensors of their own
_RESULTS: dict[Any, Any] = {}


class Mode(TorchDispatchMode):
    """A mode that sees kernels and runs them by `remembered`; a mode outside it misses those that ran before."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against that costs as much as a kernel


def remembered(function, args, kwargs):
    """Return what the kernel returns; on the meta device it is run once for each kind of arguments."""
    makes = _MADE.get(function)
    if makes is None:
        makes = _MADE[function] = _makes_new(function)
    if not makes:
        return function(*args, **kwargs)
    try:
        key = (function, _key(args), _key(tuple(kwargs.items())))
        known = _RESULTS.get(key, UNKNOWN)
    except TypeError:  # a tensor of another device, or an argument without a hash
        return function(*args, **kwargs)
    if known is UNKNOWN:
        out = function(*args, **kwargs)
        _RESULTS[key] = _outlines(out, (args, kwargs))
        return out
    return function(*args, **kwargs) if known is None else _made(known)


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors among arguments and results of a kernel, also those in lists; faster than torch's trees."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def _makes_new(function) -> bool:
    """Whether nothing that the function takes or returns may be a view of another tensor, by its schema."""
    schema = function._schema
    return not schema.is_mutable and all(one.alias_info is None for one in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    """A hashable outline of arguments. Raises TypeError for a tensor that is not on the meta device."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("not on the meta device")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_key(one) for one in value])
    return type(value), value


def _outlines(out: Any, given: Any) -> Outline | list[Outline] | None:
    """The outlines of results; None unless each is a whole tensor on the meta device with memory of its own."""
    several = isinstance(out, (list, tuple))
    results: Sequence[Any] = out if several else [out]
    storages = {x.untyped_storage()._cdata for x in tensors_in(given)}
    for x in results:
        if not isinstance(x, Tensor) or not x.is_meta or x.untyped_storage()._cdata in storages:
            return None
        storages.add(x.untyped_storage()._cdata)
        if x.storage_offset() or x.untyped_storage().nbytes() != _bytes(x):
            return None
    found = [(x.shape, x.stride(), x.dtype) for x in results]
    return found if several else found[0]


def _bytes(x: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def _made(known: Outline | list[Outline]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(known, list):
        return tuple([_empty(*one) for one in known])
    return _empty(*known)


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ops.aten.empty_strided.default(shape, stride, dtype=dtype, device="meta")
