"""FLOPs of kernels: those of matrix products, convolutions and attention, two for each multiply-add."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from flowmap.estimate.attention import ATTENTION
from flowmap.estimate.remembered import Mode, remembered


class Flops(Mode):
    """Within it, `count` are the FLOPs of the kernels that ran."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = remembered(function, args, kwargs)
        self.count += flops_of(function._overloadpacket, args, kwargs, out)
        return out


def flops_of(packet, args, kwargs, out) -> int:
    """Return the FLOPs of a kernel, by its name without the overload, with these arguments and results."""
    formula: Callable[..., int] | None = FORMULAS.get(packet)
    if formula is not None:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
        named = {key: tuple(x.shape) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        return formula(*shapes, **named)
    if packet is torch.ops.aten.bmm:  # with a dtype of its result, which torch's formula does not take
        args = args[:2]
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def _attention_flops(query, key, value, *args, **kwargs) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(grad, query, key, value, *args, **kwargs) -> int:
    return 2 * _attention_flops(query, key, value)


def _attention_tangent_flops(query, key, value, out, tquery, tkey, tvalue, mask, tmask, *args, **kwargs) -> int:
    """Return the FLOPs of the scores and of each product with a tangent."""
    moves = any(one is not None for one in (tquery, tkey, tmask))
    of_keys = 1 + (tquery is not None) + (tkey is not None)
    of_values = moves + (tvalue is not None)
    return 2 * math.prod(out[:-1]) * key[-2] * (of_keys * query[-1] + of_values * value[-1])


def _convolution_backward_flops(
    grad, x, weight, bias, stride, padding, dilation, transposed, extra, groups, wanted, **kwargs
) -> int:
    """Return as many FLOPs as forward for each gradient wanted, also with groups, which torch's formula omits."""
    places = x if transposed else grad
    return 2 * places[0] * math.prod(places[2:]) * math.prod(weight) * sum(wanted[:2])


FORMULAS: dict[Any, Callable[..., int]] = {
    ATTENTION: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.flowmap.attention_tangent: _attention_tangent_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
