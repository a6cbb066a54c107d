"""The tangent of attention by blocks of queries and keys, in any device's own matrix products.

The softmax is accumulated online (Milakov and Gimelshein 2018, arXiv:1805.02867), so that besides arrays of the size of
the arguments only a block of weights is in memory, whatever the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.tangent.attention_call import Call

HALF = (torch.float16, torch.bfloat16)
Part = tuple[slice, slice, slice]  # sequences, heads, and queries or keys


@dataclass(frozen=True)
class Block:
    """The most sequences, heads, queries and keys whose weights are in memory at once."""

    sequences: int
    heads: int
    queries: int
    keys: int


def block_of(call: Call) -> Block:
    """The block for the call's shape: on a CPU one that fits into a core's cache, elsewhere 64 MiB of float32."""
    sequences, heads, queries, _ = call.query.shape
    on_cpu = call.query.device.type == "cpu"
    rows, columns = (256, 512) if on_cpu else (4096, 4096)
    numbers = rows * columns * (torch.get_num_threads() if on_cpu else 1)
    queries, keys = min(queries, rows), min(call.key.shape[2], columns)
    together = max(1, numbers // (queries * keys))
    return Block(max(1, together // heads), min(heads, together), queries, keys)


def by_blocks(call: Call) -> Tensor:
    """The tangent of attention, (B, H, M, e) in the type and with the strides of out.

    Sums are in float32 or better; on a CPU, so are the products of half precision.
    """
    block, arrays = block_of(call), arrays_of(call)
    tangent = torch.empty_like(call.out)
    sequences, heads, queries, _ = call.query.shape
    for b in range(0, sequences, block.sequences):
        for h in range(0, heads, block.heads):
            at = slice(b, b + block.sequences), slice(h, h + block.heads)
            for i in range(0, queries, block.queries):
                rows = (*at, slice(i, i + block.queries))
                tangent[rows] = of_rows(call, arrays, rows, block.keys)
    return tangent


@dataclass(frozen=True)
class Arrays:
    """What the products of all blocks read, contiguous: the scores are q k', their tangent is left right'."""

    query: Tensor
    key: Tensor
    left: Tensor | None
    right: Tensor | None
    value: Tensor
    tvalue: Tensor | None


def arrays_of(call: Call) -> Arrays:
    """dq k' + q dk' as one product of the arrays (dq, q) and (k, dk)."""

    def whole(x: Tensor | None, repeats: int) -> Tensor | None:
        if x is None:
            return None
        x = x.float() if x.dtype in HALF and x.device.type == "cpu" else x
        return x.repeat_interleave(repeats, 1) if repeats > 1 else x.contiguous()

    q, tq = whole(call.query, 1), whole(call.tquery, 1)
    k, v, tk, tv = (whole(x, call.groups) for x in (call.key, call.value, call.tkey, call.tvalue))
    assert q is not None and k is not None and v is not None
    if tq is None and tk is None:
        return Arrays(q, k, None, None, v, tv)
    if tq is None or tk is None:
        return Arrays(q, k, q if tq is None else tq, k if tk is None else tk, v, tv)
    size, left, right = q.shape[-1], torch.cat([tq, q], -1), torch.cat([k, tk], -1)
    return Arrays(left[..., size:], right[..., :size], left, right, v, tv)


def of_rows(call: Call, arrays: Arrays, rows: Part, columns: int) -> Tensor:
    """The tangent of these queries, from sums over blocks of keys: (sum w ds v + w dv - (sum w ds) out) / sum w.

    w = exp(s - greatest), where `greatest` is the largest score s so far: the sums fade when it grows.
    """
    query, keys = arrays.query[rows], arrays.key.shape[2]
    last = min(keys, rows[2].start + query.shape[2]) if call.causal else keys
    greatest, sums = query.new_full((), -math.inf), None
    for j in range(0, last, columns):
        part = (*rows[:2], slice(j, min(j + columns, last)))
        scores = masked(product(query, arrays.key[part].mT, call.scale), call, rows, part[2])
        before, greatest = greatest, torch.maximum(greatest, scores.amax(-1, keepdim=True))
        shift = greatest.masked_fill(greatest == -math.inf, 0)  # no key seen yet
        found = sums_of(call, arrays, scores.sub_(shift).exp_(), rows, part)
        fade = (before - shift).exp_()
        sums = found if sums is None else [fade * old + new for old, new in zip(sums, found, strict=True)]
    assert sums is not None  # there are keys
    weight, total, *moved = sums
    if moved:
        total = torch.addcmul(total, moved[0], call.out[rows].to(total.dtype), value=-1)
    return total / weight.masked_fill(weight == 0, 1)


def masked(scores: Tensor, call: Call, rows: Part, columns: slice) -> Tensor:
    """The scores of a block, -inf where the query does not see the key; written in place."""
    if call.causal:
        first = rows[2].start - columns.start
        unseen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu_(first + 1)
        return scores.masked_fill_(unseen, -math.inf)
    if call.mask is None:
        return scores
    mask = call.mask[(*rows, columns)]
    return scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)


def sums_of(call: Call, arrays: Arrays, w: Tensor, rows: Part, part: Part) -> list[Tensor]:
    """sum w, sum w ds v + w dv, and sum w ds if the scores have a tangent."""
    weight, total, value = w.sum(-1, keepdim=True), None, arrays.value[part]
    if arrays.tvalue is not None:
        total = product(w.to(value.dtype), arrays.tvalue[part])
    if not call.moves:
        assert total is not None  # an argument has a tangent
        return [weight, total]
    moved = None
    if arrays.left is not None and arrays.right is not None:
        moved = product(arrays.left[rows], arrays.right[part].mT, call.scale)
    if call.tmask is not None:
        tmask = call.tmask[(*rows, part[2])]
        moved = tmask.to(w.dtype) if moved is None else moved.add_(tmask)
    assert moved is not None
    moved = moved * w if arrays.left is None else moved.mul_(w)
    through = product(moved.to(value.dtype), value)
    return [weight, through if total is None else total.add_(through), moved.sum(-1, keepdim=True)]


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a @ b, accumulated and returned in float32 or better."""
    if a.dtype not in HALF:
        return (a if scale == 1 else a * scale) @ b
    if a.device.type not in ("cuda", "meta") or torch.__version__ < "2.8":
        return (a.float() * scale) @ b.float()
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return (
        torch.bmm(left, right, out_dtype=torch.float32)
        .mul_(scale)
        .unflatten(0, batch or (1,))
        .reshape(*batch, a.shape[-2], b.shape[-1])
    )
