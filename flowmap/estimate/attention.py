"""Attention as one fused kernel on the meta device, where costs are counted, also in a dual forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from flowmap.flow.tangent import rows, rules

# This fused kernel has shapes on every device.
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_OF_TORCH = F.scaled_dot_product_attention


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention as one fused kernel that has shapes on the meta device."""
    if has_torch_function((query, key, value, attn_mask)):
        found = (query, key, value, attn_mask)
        return handle_torch_function(
            attention, found, *found, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Make attention a fused kernel, and in a dual forward its tangent a second one (flow/tangent/attention.py)."""
    tables: list[dict[Callable, Callable]] = [rules.RULES, rows.KINDS]
    for one in tables:
        one[attention] = one[ATTENTION_OF_TORCH]
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ATTENTION_OF_TORCH
        for one in tables:
            del one[attention]
