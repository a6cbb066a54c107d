"""The tangent of attention as one Triton kernel: keys and values are streamed, no weights are written to memory.

A program computes BLOCK_M queries of one head, online over blocks of BLOCK_N keys as attention_blocks.py does. The
softmax is in base 2. Import this module only where triton is installed; torch for CUDA on Linux brings it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowmap.flow.tangent.attention_call import Call

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 128


@triton.jit
def kernel(
    Q, K, V, O, TQ, TK, TV, MASK, TMASK, OUT,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    tq_b, tq_h, tq_m, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    mask_b, mask_h, mask_m, mask_n, tmask_b, tmask_h, tmask_m, tmask_n, out_b, out_h, out_m,
    heads, groups, num_queries, num_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
    BOOLEAN: tl.constexpr, ADDITIVE: tl.constexpr, HAS_TMASK: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of do = (sum w ds v + w dv - (sum w ds) o) / sum w, w = exp2((s - greatest) log2 e)."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    b = tl.cast(tl.program_id(0) // blocks // heads, tl.int64)
    h, g = tl.cast(head, tl.int64), tl.cast(head // groups, tl.int64)  # g: the head of keys
    rows, d, e = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    in_q = (rows < num_queries)[:, None] & (d < D)[None, :]
    in_o = (rows < num_queries)[:, None] & (e < E)[None, :]
    q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_m + d[None, :], mask=in_q, other=0.0)
    if HAS_TQ:
        tq = tl.load(TQ + b * tq_b + h * tq_h + rows[:, None] * tq_m + d[None, :], mask=in_q, other=0.0)
    greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight, moved = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last = num_keys
    if CAUSAL:
        last = tl.minimum(num_keys, first + BLOCK_M)
    for start in range(0, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_k = (d < D)[:, None] & (n < num_keys)[None, :]
        in_v = (n < num_keys)[:, None] & (e < E)[None, :]
        inside = (rows < num_queries)[:, None] & (n < num_keys)[None, :]
        k = tl.load(K + b * k_b + g * k_h + n[None, :] * k_n + d[:, None], mask=in_k, other=0.0)
        v = tl.load(V + b * v_b + g * v_h + n[:, None] * v_n + e[None, :], mask=in_v, other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = inside
        if CAUSAL:
            seen = seen & (n[None, :] <= rows[:, None])
        at = b * mask_b + h * mask_h + rows[:, None] * mask_m + n[None, :] * mask_n
        if BOOLEAN:
            seen = seen & (tl.load(MASK + at, mask=inside, other=0) != 0)
        if ADDITIVE:
            s += tl.load(MASK + at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(greatest, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(greatest - shift)
        w = tl.exp2(s - shift[:, None])
        weight = weight * fade + tl.sum(w, 1)
        total = total * fade[:, None]
        greatest = new
        if HAS_TQ or HAS_TK or HAS_TMASK:
            ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if HAS_TQ:
                ds = tl.dot(tq, k, ds, input_precision=PRECISION)
            if HAS_TK:
                tk = tl.load(TK + b * tk_b + g * tk_h + n[None, :] * tk_n + d[:, None], mask=in_k, other=0.0)
                ds = tl.dot(q, tk, ds, input_precision=PRECISION)
            ds = ds * scale
            if HAS_TMASK:
                at = b * tmask_b + h * tmask_h + rows[:, None] * tmask_m + n[None, :] * tmask_n
                ds += tl.load(TMASK + at, mask=inside, other=0.0).to(tl.float32)
            ds = ds * w
            moved = moved * fade + tl.sum(ds, 1)
            total = tl.dot(ds.to(v.dtype), v, total, input_precision=PRECISION)
        if HAS_TV:
            tv = tl.load(TV + b * tv_b + g * tv_h + n[:, None] * tv_n + e[None, :], mask=in_v, other=0.0)
            total = tl.dot(w.to(v.dtype), tv, total, input_precision=PRECISION)
    o = tl.load(O + b * o_b + h * o_h + rows[:, None] * o_m + e[None, :], mask=in_o, other=0.0).to(tl.float32)
    weight = tl.where(weight == 0.0, 1.0, weight)
    found = (total - moved[:, None] * o) / weight[:, None]
    at = OUT + b * out_b + h * out_h + rows[:, None] * out_m + e[None, :]
    tl.store(at, found.to(OUT.dtype.element_ty), mask=in_o)


def takes(call: Call) -> bool:
    """Whether the kernel is made for this call: NVIDIA GPUs, half precision or TensorFloat-32, heads of at most 128.

    Products of whole float32 would spill the kernel's registers.
    """
    size = max(call.query.shape[-1], call.value.shape[-1])
    tf32 = call.out.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    known = (tf32 or call.out.dtype in HALF) and call.out.stride(-1) == 1
    return call.out.device.type == "cuda" and torch.version.hip is None and known and size <= LARGEST_HEAD


def by_kernel(call: Call) -> Tensor:
    """The tangent of attention, (B, H, M, e) in the type and with the strides of out."""
    tangent = torch.empty_like(call.out)
    with torch.cuda.device_of(call.query):
        launch(call, tangent, *block_of(call))
    return tangent


def block_of(call: Call) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages, so that the arrays of a program fit into 99 KiB of shared memory."""
    small = max(call.query.shape[-1], call.value.shape[-1]) <= 64
    if call.out.dtype == torch.float32:
        return (64, 32, 4, 2) if small else (64, 16, 8, 2)
    return (64, 64, 4, 2) if small else (64, 32, 8, 2)


def launch(call: Call, tangent: Tensor, block_m: int, block_n: int, warps: int, stages: int) -> None:
    """Run the kernel; heads are padded to a power of two from 16."""
    arrays = [_rowwise(x) for x in (call.query, call.key, call.value, call.out, call.tquery, call.tkey, call.tvalue)]
    q, k, v, o, tq, tk, tv = arrays
    mask = call.mask.view(torch.uint8) if call.mask is not None and call.mask.dtype == torch.bool else call.mask
    (batch, heads, queries, size), width = call.query.shape, call.value.shape[-1]
    place = lambda x, count: (0,) * count if x is None else x.stride()[:count]
    kernel[(triton.cdiv(queries, block_m) * heads * batch,)](
        *(q if x is None else x for x in (q, k, v, o, tq, tk, tv, mask, call.tmask, tangent)),
        *(stride for x in (q, k, v, o, tq, tk, tv) for stride in place(x, 3)),
        *place(mask, 4),
        *place(call.tmask, 4),
        *place(tangent, 3),
        heads,
        call.groups,
        queries,
        call.key.shape[2],
        call.scale,
        D=size,
        E=width,
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_E=max(16, triton.next_power_of_2(width)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HAS_TQ=tq is not None,
        HAS_TK=tk is not None,
        HAS_TV=tv is not None,
        BOOLEAN=mask is not None and mask.dtype == torch.uint8,
        ADDITIVE=mask is not None and mask.dtype != torch.uint8,
        HAS_TMASK=call.tmask is not None,
        CAUSAL=call.causal,
        PRECISION="tf32" if call.out.device.type == "cuda" else "ieee",
        num_warps=warps,
        num_stages=stages,
    )


def _rowwise(x: Tensor | None) -> Tensor | None:
    """x with adjacent numbers in its last dimension."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
