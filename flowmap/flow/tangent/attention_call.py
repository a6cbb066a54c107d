"""One call of attention with its output and tangents, in the shapes that the kernels take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """softmax(scale q k' + mask) v, its output, and the tangents of its arguments (None: zero).

    query and its tangent are (B, H, M, d), key (B, H / groups, N, d), value (B, H / groups, N, e), out (B, H, M, e).
    mask is boolean (True: the query sees the key) or additive; mask and its tangent are views of shape (B, H, M, N).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    tquery: Tensor | None
    tkey: Tensor | None
    tvalue: Tensor | None
    mask: Tensor | None
    tmask: Tensor | None
    causal: bool
    scale: float

    @property
    def groups(self) -> int:
        """The number of heads of queries for each head of keys."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def moves(self) -> bool:
        """Whether the scores have a tangent."""
        return self.tquery is not None or self.tkey is not None or self.tmask is not None


def call_of(query, key, value, out, tquery, tkey, tvalue, mask, tmask, causal, scale, grouped) -> Call:
    """The call with all tensors in four dimensions, from torch's arguments with any dimensions before the last two.

    grouped: heads of queries share those of keys.
    """
    lead = tuple(out.shape[:-2])
    shared = (*lead[:-1], key.shape[-3]) if grouped else lead
    places = (*lead, out.shape[-2], key.shape[-2])
    mask, tmask = (None if x is None else _four(x.expand(places), lead) for x in (mask, tmask))
    of_queries = [_four(x, lead) for x in (query, tquery, out)]
    of_keys = [_four(x, shared) for x in (key, value, tkey, tvalue)]
    (q, tq, o), (k, v, tk, tv) = of_queries, of_keys
    assert q is not None and k is not None and v is not None and o is not None
    return Call(q, k, v, o, tq, tk, tv, mask, tmask, causal, scale)


def _four(x: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """x (..., n, d) with the dimensions `lead` before the last two, flattened to (batch, heads, n, d)."""
    if x is None or len(lead) == 2 and x.shape[:-2] == lead:
        return x
    heads = lead[-1] if lead else 1
    return x.expand(*lead, *x.shape[-2:]).reshape(math.prod(lead[:-1]), heads, *x.shape[-2:])
