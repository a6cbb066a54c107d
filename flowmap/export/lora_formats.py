"""The weights of a LoRA with the names that PEFT and ComfyUI read.

Ours are those of diffusers: A (r, in), B (out, r) and, of a network with a constant in its time embedding, biases of B;
the scale is 1. PEFT has the same tensors under another prefix. ComfyUI has the layers of the original checkpoint, which
fuses some of them: rows of the fused B are block-diagonal and A is stacked, so that the product is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PEFT_PREFIX, COMFY_PREFIX = "base_model.model.", "diffusion_model."
# FLUX: the layer of the original checkpoint, and the layers of diffusers that it fuses, in order
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "norm_out.linear"  # diffusers has scale before shift, the original shift before scale
SAME_NAMES = ("QwenImageTransformer2DModel",)  # the original checkpoint has the layers of diffusers


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
        key = COMFY_PREFIX + layer
        products = [_pair(weights, part) for part in parts]
        if any(pair is not None for pair in products):
            found |= _fused(key, products, widths)
        biases = [weights.get(f"{part}.lora_B.bias") for part in parts]
        if any(bias is not None and bool(bias.any()) for bias in biases):
            rows = [
                _ordered(part, torch.zeros(n) if b is None else b)
                for part, b, n in zip(parts, biases, widths, strict=True)
            ]
            found[f"{key}.diff_b"] = torch.cat(rows).contiguous()
    return found


def _layers(weights: Mapping[str, Tensor], network: str) -> dict[str, tuple[str, ...]]:
    """The layers of the original checkpoint that the adapters touch, each with the layers that it fuses."""
    names = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in weights)
    if network in SAME_NAMES:
        return {name: (name,) for name in names}
    if network != "FluxTransformer2DModel":
        known = ", ".join(("FluxTransformer2DModel", *SAME_NAMES))
        raise ValueError(f"--to lora-comfyui: the original names of {network} are not known; those of {known} are")
    return dict(_original_of_flux(name) for name in names)


def _original_of_flux(name: str) -> tuple[str, tuple[str, ...]]:
    """(the layer of the original checkpoint, the layers of diffusers that it fuses)."""
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    table, inner = (OUTSIDE, name) if block is None else (SINGLE if block[1] else DOUBLE, block[3])
    for layer, parts in table.items():
        if inner in parts:
            if block is None:
                return layer, parts
            prefix = f"{block[1] or ''}transformer_blocks.{block[2]}."
            return f"{'single' if block[1] else 'double'}_blocks.{block[2]}.{layer}", tuple(prefix + p for p in parts)
    raise ValueError(f"--to lora-comfyui: {name} has no layer in the original checkpoint")


def _pair(weights: Mapping[str, Tensor], part: str) -> tuple[Tensor, Tensor] | None:
    """A and B of a layer, B in the original's order of rows; None without an adapter, or where B is zero."""
    a, b = weights.get(f"{part}.lora_A.weight"), weights.get(f"{part}.lora_B.weight")
    return None if a is None or b is None or not bool(b.any()) else (a, _ordered(part, b))


def _ordered(part: str, rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if part == SWAPPED else rows


def _fused(key: str, pairs: list[tuple[Tensor, Tensor] | None], widths: list[int]) -> dict[str, Tensor]:
    """One adapter for layers that are one: A stacked, B block-diagonal, alpha the rank, so that the scale is 1."""
    some = next(pair for pair in pairs if pair is not None)
    blank = torch.zeros_like(some[0])
    down = torch.cat([blank if pair is None else pair[0] for pair in pairs])
    ups = [
        torch.zeros(width, len(blank)) if pair is None else pair[1] for pair, width in zip(pairs, widths, strict=True)
    ]
    return {
        f"{key}.lora_down.weight": down.contiguous(),
        f"{key}.lora_up.weight": torch.block_diag(*ups).contiguous(),
        f"{key}.alpha": torch.tensor(float(len(down))),
    }
