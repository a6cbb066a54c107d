"""Attention with its tangent: do = (w ds) v + w dv - rowsum(w ds) o, with w = softmax(s) and s = q k' c + mask.

Small calls are computed as a whole. Others are one operator, `flowmap::attention_tangent`, which needs memory of the
size of its arguments only and which torch.compile, torch.export and the meta device see as one kernel: on CUDA a
Triton kernel (attention_triton.py), elsewhere blocks of matrix products (attention_blocks.py).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap.base.precision import without_autocast
from flowmap.flow.tangent.attention_blocks import by_blocks, product
from flowmap.flow.tangent.attention_call import Call, call_of
from flowmap.flow.tangent.rules_base import add_up

aten = torch.ops.aten
HAS_TRITON = importlib.util.find_spec("triton") is not None
WHOLE_NUMBERS, WHOLE_NUMBERS_OF_DEVICE = 1 << 18, 1 << 24
"""The most attention weights for which a call is computed as a whole, on a CPU and elsewhere: that is quicker there."""

LIBRARY = torch.library.Library("flowmap", "DEF")
LIBRARY.define(
    "attention_tangent(Tensor query, Tensor key, Tensor value, Tensor out, Tensor? tquery, Tensor? tkey, "
    "Tensor? tvalue, Tensor? mask, Tensor? tmask, bool causal, float scale, bool grouped) -> Tensor",
    tags=torch.Tag.needs_fixed_stride_order,
)


def attention_and_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tquery: Tensor | None = None,
    tkey: Tensor | None = None,
    tvalue: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    tmask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """(F.scaled_dot_product_attention of the arguments with its graph, its tangent without one).

    query is (..., M, d), key (..., N, d), value (..., N, e), and each tangent like its argument, or None for zero. The
    output is torch's own, and the tangent needs O(M + N) memory.
    """
    named: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    out = F.scaled_dot_product_attention(query, key, value, **named)
    tangents = tquery, tkey, tvalue, tmask
    with torch.no_grad():
        return out, attention_tangent(out, query, key, value, tangents, **named)


def attention_tangent(
    out, query, key, value, tangents, *, attn_mask=None, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """The tangent of attention with this output; tangents are those of query, key, value and mask (None: zero).

    Sums are in float32 or better, as in torch.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    tq, tk, tv, tmask = tangents
    if all(t is None for t in tangents):
        return torch.zeros_like(out, requires_grad=False)
    with without_autocast(out.device):
        q, k, v = (x.to(out.dtype) for x in (query, key, value))
        tq, tk, tv = (None if x is None else x.to(out.dtype) for x in (tq, tk, tv))
        given = (q, k, v, out, tq, tk, tv, attn_mask, tmask, is_causal, scale, enable_gqa)
        return whole(*given) if is_small(out, key) else torch.ops.flowmap.attention_tangent(*given)


def is_small(out: Tensor, key: Tensor) -> bool:
    """Whether a call is computed as a whole: not on the meta device, where costs are counted, nor where a kernel is."""
    kind = out.device.type
    if kind == "meta" or kind == "cuda" and HAS_TRITON:
        return False
    numbers = math.prod(out.shape[:-1]) * key.shape[-2]
    return numbers <= (WHOLE_NUMBERS if kind == "cpu" else WHOLE_NUMBERS_OF_DEVICE)


def by_operator(
    query, key, value, out, tquery, tkey, tvalue, mask, tmask, causal: bool, scale: float, grouped: bool
) -> Tensor:
    """The operator on any device, in the type and with the strides of out."""
    call = call_of(query, key, value, out, tquery, tkey, tvalue, mask, tmask, causal, scale, grouped)
    with torch.no_grad(), without_autocast(out.device):
        found = fused(call) if out.is_cuda and HAS_TRITON else by_blocks(call)
    return found if out.ndim == 4 else torch.empty_like(out).copy_(found.view(out.shape))


def fused(call: Call) -> Tensor:
    """The tangent by the Triton kernel, or by blocks for calls that it is not made for."""
    from flowmap.flow.tangent import attention_triton

    return attention_triton.by_kernel(call) if attention_triton.takes(call) else by_blocks(call)


def outline(query, key, value, out, *unused) -> Tensor:
    """The operator's result without its numbers, for the meta device and tracing."""
    return torch.empty_like(out)


def refuse_gradient(ctx, grad):
    """Raise: a rate is a target, which has no gradient."""
    raise NotImplementedError(
        "the tangent of attention has no gradient: use value_and_graded_rate to differentiate through a rate"
    )


LIBRARY.impl("attention_tangent", by_operator, "CompositeExplicitAutograd")
torch.library.register_fake("flowmap::attention_tangent", outline, lib=LIBRARY)
torch.library.register_autograd("flowmap::attention_tangent", refuse_gradient, lib=LIBRARY)


def whole(q, k, v, out, tq, tk, tv, mask, tmask, causal, scale, grouped) -> Tensor:
    """The tangent with all weights in memory at once."""
    if grouped:
        repeats = q.shape[-3] // k.shape[-3]
        k, v, tk, tv = (None if x is None else x.repeat_interleave(repeats, -3) for x in (k, v, tk, tv))
    weights = product(q, k.mT, scale)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        weights = torch.softmax(weights, -1)
    else:
        weights = aten._safe_softmax(
            weights.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else weights + mask, -1
        )
    by_query = None if tq is None else product(tq, k.mT, scale)
    by_key = None if tk is None else product(q, tk.mT, scale)
    moved = add_up(by_query, by_key, tmask)
    total = None if tv is None else product(weights.to(v.dtype), tv)
    if moved is not None:
        moved = moved * weights
        d = product(moved.to(v.dtype), v)
        total = add_up(torch.addcmul(d, moved.sum(-1, keepdim=True), out, value=-1), total)
    assert total is not None  # an argument has a tangent
    return total.to(out.dtype)
