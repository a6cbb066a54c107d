"""What a network costs, found without any weights: parameters, FLOPs of a forward pass, bytes that autograd keeps for the backward pass.

FLOPs are those of matrix products, convolutions and attention, two for each multiply-add, as torch.utils.flop_counter counts them. Attention
is counted as the fused kernels do it: no matrix of tokens by tokens is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowmap.nets.diffusers_model import DiffusersNet, called
from flowmap.nets.diffusers_text import example_conditions
from flowmap.student import StudentConfig

ROWS = 2  # of the batch that is counted; the figures are for one sample


@dataclass(frozen=True)
class Cost:
    """Of one sample: FLOPs of a forward pass, and bytes kept in float32; trained and frozen parameters; blocks that checkpointing cuts at."""

    flops: float
    kept_bytes: float
    trained: int
    frozen: int
    blocks: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def cost_of(config: StudentConfig) -> Cost:
    """Counted on the meta device, which holds no values. ValueError where the network cannot be built."""
    with torch.device("meta"):
        flow_map = config.build()
    trained = sum(p.numel() for p in flow_map.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in flow_map.parameters()) - trained
    flow_map.to("meta")  # tables that a library makes by numpy
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), _fused_attention() as attention, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _forward(flow_map.net, config)
    return Cost((counter.get_total_flops() + attention.flops) / ROWS, kept / ROWS, trained, frozen, _blocks(flow_map.net))


def _forward(net: nn.Module, config: StudentConfig) -> None:
    x, t = torch.zeros(ROWS, *config.shape), torch.full((ROWS,), 0.5)
    cond = {"class": torch.zeros(ROWS, dtype=torch.int64)} if config.num_classes else {}
    if isinstance(net, DiffusersNet):  # its clock looks at values, and costs nothing beside the network
        called(net.model, x, t, cond | {"guidance": t} | example_conditions(config.net, ROWS))
    else:
        net(x, t, t, cond | ({"guidance": t} if config.guidance else {}))


def _blocks(net: nn.Module) -> int:
    """How many parts activation checkpointing cuts the network into."""
    model = getattr(net, "model", net)
    rows = [getattr(model, name, ()) for name in ("blocks", "transformer_blocks", "single_transformer_blocks")]
    return max(1, sum(map(len, rows)) or sum(type(part).__name__.startswith(("Resnet", "Transformer2D", "UNetBlock")) for part in model.modules()))


class _Fused(torch.autograd.Function):
    """Attention's shapes and what its fused kernels keep: queries, keys, values and the result."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise AssertionError("only the forward pass is counted")


class _Attention:
    flops = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        self.flops += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _Fused.apply(query, key, value)


@contextmanager
def _fused_attention() -> Iterator[_Attention]:
    original, attention = F.scaled_dot_product_attention, _Attention()
    F.scaled_dot_product_attention = attention
    try:
        yield attention
    finally:
        F.scaled_dot_product_attention = original
