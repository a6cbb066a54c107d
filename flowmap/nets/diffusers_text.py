"""The text conditions that a diffusers network reads and their widths, from its settings, before a run starts."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from flowmap.nets.diffusers_model import DiffusersModel

# network class -> condition -> the settings that define its width; the first one that is set counts
WIDTHS: dict[str, dict[str, tuple[str, ...]]] = {
    "UNet2DConditionModel": {"text": ("encoder_hid_dim", "cross_attention_dim")},
    "SD3Transformer2DModel": {"text": ("joint_attention_dim",), "pooled": ("pooled_projection_dim",)},
    "FluxTransformer2DModel": {"text": ("joint_attention_dim",), "pooled": ("pooled_projection_dim",)},
    "QwenImageTransformer2DModel": {"text": ("joint_attention_dim",)},
    "ZImageTransformer2DModel": {"text": ("cap_feat_dim",)},
    "Flux2Transformer2DModel": {"text": ("joint_attention_dim",)},
    "HunyuanImageTransformer2DModel": {"text": ("text_embed_dim",)},
    "Lumina2Transformer2DModel": {"text": ("cap_feat_dim",)},
    "AuraFlowTransformer2DModel": {"text": ("joint_attention_dim",)},
    "SanaTransformer2DModel": {"text": ("caption_channels",)},
    "PixArtTransformer2DModel": {"text": ("caption_channels",)},
}


def example_conditions(net: DiffusersModel, batch: int, tokens: int = 77) -> dict[str, Tensor]:
    """Zeros in the shapes of the network's text conditions.

    These are "text" (batch, tokens, D), "pooled" (batch, P) and SDXL's "size" (batch, 6).
    """
    settings = json.loads(net.settings)
    found = {}
    for key, names in WIDTHS.get(net.network, {}).items():
        width = next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
        if width is not None:
            found[key] = torch.zeros(batch, tokens, width) if key == "text" else torch.zeros(batch, width)
    if settings.get("addition_embed_type") == "text_time":
        numbers = 6 * settings["addition_time_embed_dim"]
        found["pooled"] = torch.zeros(batch, settings["projection_class_embeddings_input_dim"] - numbers)
        found["size"] = torch.zeros(batch, 6)
    return found


def check_text(net: DiffusersModel, cond: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if text conditions that the network reads are missing, or have another width."""
    settings = json.loads(net.settings)
    for key, names in WIDTHS.get(net.network, {}).items():
        if key not in cond:
            needed = "data of kind encoded with a text encoder (data.text) does"
            raise ValueError(f"data: gives no {key!r}, which {net.network} reads; {needed}")
        width = next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
        given = cond[key].shape[-1]
        if width is not None and given != width:
            needed = "data.text must be the text encoder of that network"
            raise ValueError(f"data: its {key!r} is {given} wide, {net.network} reads {width}: {needed}")
