"""Frozen linear layers with weights in 8 or 4 bits, which every pass dequantises: forward, tangent and backward.

Between passes only the codes are kept, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The codes are those of
bitsandbytes, which has kernels for CPU and GPU:
    int8    absmax of each row / 127: 1 byte a weight; error at most 1/254 of the row's largest weight
    nf4     16 quantiles of a normal law times the absmax of 64 weights: 0.56 bytes; at most 0.152 of that absmax
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from flowmap.base.precision import autocast_dtype, without_autocast
from flowmap.flow.tangent.rows import KINDS, by_vector
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import T
from flowmap.nets.blocks import blocks_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import leave_out_base
from flowmap.nets.precision import KEPT
from flowmap.nets.time_embedding import TIME_EMBEDDINGS

FORMATS = ("int8", "nf4")
SMALLEST = 4096  # weights of a layer; smaller ones save too little
BLOCK = 64  # weights of NF4 with one scale
DEQUANTISED = (torch.float32, torch.bfloat16, torch.float16)  # what the kernel of NF4 writes


def check_available(key: str = "quantize.frozen") -> None:
    """Raise a one-line ValueError that names `key` if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{key}: needs bitsandbytes: pip install 'flowmap-distillation[quantize]'")


def check_format(form: str, key: str) -> None:
    """Raise a one-line ValueError that names `key` for an unknown format."""
    if form not in FORMATS:
        raise ValueError(f"{key}: {form!r} is not one of {', '.join(FORMATS)}")


class QuantizedLinear(nn.Module):
    """x W' + b with a frozen quantised W, in the precision that autocast gives a linear layer, else in that of x.

    codes and scales are parameters so that they are shared, moved and sharded as other frozen weights are. scales has
    the bits of float32 numbers as integers: no change of precision, such as FSDP2's, rounds them.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, form: str, codes: nn.Parameter, scales: nn.Parameter):
        super().__init__()
        self.in_features, self.out_features, self.form = layer.in_features, layer.out_features, form
        self.codes, self.scales = codes, scales
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return quantized_linear(x.to(autocast_dtype(x)), self.codes, self.scales, self.bias, self.form, shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


def quantize(
    nets: Sequence[FlowMapNet], form: str, *, copies: Sequence[FlowMapNet] = (), key: str = "quantize.frozen"
) -> None:
    """Quantise the frozen weights of large linear layers in the networks' blocks, in place; shared ones stay shared.

    Embeddings of times, norms, convolutions and layers with fewer than SMALLEST weights are not quantised. copies:
    networks in which only the weights that they share with `nets` are. Raises a ValueError that names `key` if there is
    no such layer.
    """
    made: dict[Tensor, tuple[nn.Parameter, nn.Parameter]] = {}
    for net in (*nets, *copies):
        for parent, name, layer in list(_large_layers(net)):
            if layer.weight not in made:
                if net in copies or layer.weight.requires_grad:
                    continue
                made[layer.weight] = _quantized(layer.weight.detach(), form)
            parent.register_module(name, QuantizedLinear(layer, form, *made[layer.weight]))
        leave_out_base(net.net)
    if not made:
        what = f"has no linear layers of {SMALLEST} weights in its blocks, and no others are quantised"
        raise ValueError(f"{key}: the network {what}; leave it out")


def quantized_layers(net: nn.Module) -> list[QuantizedLinear]:
    return [module for module in net.modules() if isinstance(module, QuantizedLinear)]


def form_of(net: nn.Module) -> str | None:
    """The format of the network's quantised layers; None if it has none."""
    return next((layer.form for layer in quantized_layers(net)), None)


def _large_layers(net: FlowMapNet) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of the layers in blocks that may be quantised."""
    for block in blocks_of(net.net):
        yield from _layers_in(block)


def _layers_in(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for name, child in module.named_children():
        if name in TIME_EMBEDDINGS or isinstance(child, KEPT):
            continue
        if type(child) is not nn.Linear:
            yield from _layers_in(child)
        elif child.weight is not None and child.weight.numel() >= SMALLEST:  # an average of adapters has no weights
            yield module, name, child


def _quantized(weight: Tensor, form: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(codes, scales) of a weight (out, in), on its device, which may be "meta"."""
    weight, ops = weight.float().contiguous(), _kernels()
    if form == "int8":
        codes, scales, _ = ops.int8_vectorwise_quant(weight)
    else:
        codes, scales = ops.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    return nn.Parameter(codes, False), nn.Parameter(scales.float().view(torch.int32), False)


def dequantized(codes: Tensor, scales: Tensor, form: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of these codes in that precision.

    NF4 is dequantised as one row: bitsandbytes 0.50 on a CPU begins a block anew in each row, where its quantisation
    does not, and so takes the wrong scales if rows are no multiple of BLOCK.
    """
    if form == "int8":
        return _kernels().int8_vectorwise_dequant(codes, scales.view(torch.float32)).to(dtype)
    written = dtype if dtype in DEQUANTISED else torch.float32
    row = _kernels().dequantize_4bit(codes, scales.view(torch.float32), BLOCK, "nf4", [shape[0] * shape[1]], written)
    return row.view(shape).to(dtype)


def _kernels() -> Any:
    import bitsandbytes  # noqa: F401  (it registers them)

    return torch.ops.bitsandbytes


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, form: str, shape: tuple[int, int]
) -> Tensor:
    """x W' + b for x (..., in) and W of shape (out, in), computed in the precision of x; a gradient for x alone."""
    if has_torch_function_unary(x):  # a dual tensor: to the rule below
        return handle_torch_function(quantized_linear, (x,), x, codes, scales, bias, form, shape)
    return _Linear.apply(x, codes, scales, bias, form, shape)


class _Linear(torch.autograd.Function):
    """It saves codes and scales, so that no dequantised weight lives until the backward pass."""

    @staticmethod
    def forward(x, codes, scales, bias, form, shape):
        weight = dequantized(codes, scales, form, shape, x.dtype)
        with without_autocast(x.device):
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, codes, scales, _, ctx.form, ctx.shape = inputs
        ctx.save_for_backward(codes, scales)
        ctx.save_for_forward(codes, scales)

    @staticmethod
    def backward(ctx: Any, gradient):
        codes, scales = ctx.saved_tensors
        with without_autocast(gradient.device):
            return gradient @ dequantized(codes, scales, ctx.form, ctx.shape, gradient.dtype), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent, *unused):
        codes, scales = ctx.saved_tensors
        with without_autocast(tangent.device):
            return F.linear(tangent, dequantized(codes, scales, ctx.form, ctx.shape, tangent.dtype))


def _tangent(op, out, x, codes, scales, bias, form, shape):
    """dx W', the rule of the dual forward."""
    return op(T(x), codes, scales, None, form, shape)


RULES[quantized_linear] = _tangent
KINDS[quantized_linear] = by_vector
