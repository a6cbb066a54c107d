"""The weights of a LoRA with the names that PEFT and ComfyUI read.

Ours are those of diffusers: A (r, in), B (out, r) and, of a network with a constant in its time embedding, biases of B;
the scale is 1. PEFT has the same tensors under another prefix. ComfyUI has the layers of the original checkpoint, which
fuses some of them: rows of the fused B are block-diagonal and A is stacked, so that the product is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowmap.export.original_names import is_swapped, original_layer

PEFT_PREFIX, COMFY_PREFIX = "base_model.model.", "diffusion_model."


def peft_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with PEFT's names."""
    return {PEFT_PREFIX + name: value for name, value in weights.items()}


def peft_config(weights: Mapping[str, Tensor], rank: int, base: str) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json."""
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    bias = any(name.endswith(".bias") for name in weights)
    return {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank, "target_modules": targets,
        "lora_bias": bias, "bias": "none", "inference_mode": True,
    }  # fmt: skip


def comfy_weights(weights: Mapping[str, Tensor], network: str, out_features: Mapping[str, int]) -> dict[str, Tensor]:
    """lora_down, lora_up, alpha and diff_b by the original checkpoint's layer.

    network: the class of diffusers. out_features: the width of each layer's output, also of those without an adapter.
    Raises a ValueError for a network whose original names are not known.
    """
    found: dict[str, Tensor] = {}
    for layer, parts in _layers(weights, network).items():
        widths = [out_features[part] for part in parts]
        swapped = [is_swapped(network, part, out_features) for part in parts]
        key = COMFY_PREFIX + layer
        products = [_pair(weights, part, swap) for part, swap in zip(parts, swapped, strict=True)]
        if any(pair is not None for pair in products):
            found |= _fused(key, products, widths)
        biases = [weights.get(f"{part}.lora_B.bias") for part in parts]
        if any(bias is not None and bool(bias.any()) for bias in biases):
            rows = [
                _ordered(torch.zeros(n) if b is None else b, swap)
                for b, n, swap in zip(biases, widths, swapped, strict=True)
            ]
            found[f"{key}.diff_b"] = torch.cat(rows).contiguous()
    return found


def _layers(weights: Mapping[str, Tensor], network: str) -> dict[str, tuple[str, ...]]:
    """The layers of the original checkpoint that the adapters touch, each with the layers that it fuses."""
    names = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in weights)
    return dict(original_layer(network, name) for name in names)


def _pair(weights: Mapping[str, Tensor], part: str, swapped: bool) -> tuple[Tensor, Tensor] | None:
    """A and B of a layer, B in the original's order of rows; None without an adapter, or where B is zero."""
    a, b = weights.get(f"{part}.lora_A.weight"), weights.get(f"{part}.lora_B.weight")
    return None if a is None or b is None or not bool(b.any()) else (a, _ordered(b, swapped))


def _ordered(rows: Tensor, swapped: bool) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if swapped else rows


def _fused(key: str, pairs: list[tuple[Tensor, Tensor] | None], widths: list[int]) -> dict[str, Tensor]:
    """One adapter for layers that are one: A stacked, B block-diagonal, alpha the rank, so that the scale is 1."""
    some = next(pair for pair in pairs if pair is not None)
    down, up = some
    if len(pairs) > 1:
        blank = torch.zeros_like(down)
        down = torch.cat([blank if pair is None else pair[0] for pair in pairs])
        ups = [
            torch.zeros(width, len(blank)) if pair is None else pair[1]
            for pair, width in zip(pairs, widths, strict=True)
        ]
        up = torch.block_diag(*ups)
    return {
        f"{key}.lora_down.weight": down.contiguous(),
        f"{key}.lora_up.weight": up.contiguous(),
        f"{key}.alpha": torch.tensor(float(len(down))),
    }
