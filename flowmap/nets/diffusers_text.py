"""What a diffusers network reads of text, and how wide: found out before a run is begun, from its settings alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from flowmap.nets.diffusers_model import DiffusersModel

# the network's class -> the condition that it reads -> the settings that say its width, the first that is given
WIDTHS = {
    "UNet2DConditionModel": {"text": ("encoder_hid_dim", "cross_attention_dim")},
    "SD3Transformer2DModel": {"text": ("joint_attention_dim",), "pooled": ("pooled_projection_dim",)},
    "FluxTransformer2DModel": {"text": ("joint_attention_dim",), "pooled": ("pooled_projection_dim",)},
    "QwenImageTransformer2DModel": {"text": ("joint_attention_dim",)},
    "SanaTransformer2DModel": {"text": ("caption_channels",)},
    "PixArtTransformer2DModel": {"text": ("caption_channels",)},
}


def check_text(net: DiffusersModel, cond: Mapping[str, Tensor]) -> None:
    """ValueError where conditions, one row or more of each, lack what the network reads of text or are of another width."""
    settings = json.loads(net.settings)
    for key, names in WIDTHS.get(net.network, {}).items():
        if key not in cond:
            raise ValueError(f"data: gives no {key!r}, which {net.network} reads; data of kind encoded with a text encoder (data.text) does")
        width = next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
        given = cond[key].shape[-1]
        if width is not None and given != width:
            raise ValueError(f"data: its {key!r} is {given} wide, {net.network} reads {width}: data.text must be the text encoder of that network")
