"""The layers of original checkpoints, and the layers of diffusers that each of them fuses, in order.

Sources: diffusers' conversions of the checkpoints of FLUX, FLUX.2, SD3, Sana, Lumina 2, Z-Image and AuraFlow; tests
map back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Fused = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Original:
    """The names of one network. blocks: by diffusers' list of blocks, the original's list and the layers of a block.

    outside: the other layers. others_alike: layers that are not listed have the names of diffusers.
    """

    blocks: Mapping[str, tuple[str, Fused]]
    outside: Fused
    others_alike: bool = False


FLUX_DOUBLE = {
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
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_OUTSIDE = {
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
SD3_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
SD3_OUTSIDE = {
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SANA_BLOCK = {  # not the depthwise convolution, whose change is no product of two matrices
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
SANA_OUTSIDE = {
    "t_embedder.mlp.0": ("time_embed.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.emb.timestep_embedder.linear_2",),
    "t_block.1": ("time_embed.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "x_embedder.proj": ("patch_embed.proj",),
    "final_layer.linear": ("proj_out",),
}
FLUX2_DOUBLE = {
    **{layer: FLUX_DOUBLE[layer] for layer in ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj")},
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
FLUX2_OUTSIDE = {
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    **{layer: FLUX_OUTSIDE[layer] for layer in ("txt_in", "img_in")},
    **{layer: FLUX_OUTSIDE[layer] for layer in ("final_layer.linear", "final_layer.adaLN_modulation.1")},
}
LUMINA2_BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
LUMINA2_OUTSIDE = {
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "x_embedder": ("x_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
Z_IMAGE_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
Z_IMAGE_OUTSIDE = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
AURA_FLOW_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
AURA_FLOW_JOINT = {
    "modX.1": ("norm1.linear",),
    "modC.1": ("norm1_context.linear",),
    "attn.w2q": ("attn.to_q",),
    "attn.w2k": ("attn.to_k",),
    "attn.w2v": ("attn.to_v",),
    "attn.w2o": ("attn.to_out.0",),
    "attn.w1q": ("attn.add_q_proj",),
    "attn.w1k": ("attn.add_k_proj",),
    "attn.w1v": ("attn.add_v_proj",),
    "attn.w1o": ("attn.to_add_out",),
    **{f"mlpX.{theirs}": (f"ff.{ours}",) for theirs, ours in AURA_FLOW_FORWARD.items()},
    **{f"mlpC.{theirs}": (f"ff_context.{ours}",) for theirs, ours in AURA_FLOW_FORWARD.items()},
}
AURA_FLOW_SINGLE = {
    "modCX.1": ("norm1.linear",),
    "attn.w1q": ("attn.to_q",),
    "attn.w1k": ("attn.to_k",),
    "attn.w1v": ("attn.to_v",),
    "attn.w1o": ("attn.to_out.0",),
    **{f"mlp.{theirs}": (f"ff.{ours}",) for theirs, ours in AURA_FLOW_FORWARD.items()},
}
AURA_FLOW_OUTSIDE = {
    "t_embedder.mlp.0": ("time_step_proj.linear_1",),
    "t_embedder.mlp.2": ("time_step_proj.linear_2",),
    "cond_seq_linear": ("context_embedder",),
    "init_x_linear": ("pos_embed.proj",),
    "modF.1": ("norm_out.linear",),
    "final_linear": ("proj_out",),
}
STREAMS = ("layers", "noise_refiner", "context_refiner")  # lists of blocks of Lumina 2 and Z-Image
ORIGINALS = {
    "FluxTransformer2DModel": Original(
        {
            "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
        },
        FLUX_OUTSIDE,
    ),
    "SD3Transformer2DModel": Original({"transformer_blocks": ("joint_blocks", SD3_JOINT)}, SD3_OUTSIDE),
    "SanaTransformer2DModel": Original({"transformer_blocks": ("blocks", SANA_BLOCK)}, SANA_OUTSIDE),
    "Flux2Transformer2DModel": Original(
        {
            "transformer_blocks": ("double_blocks", FLUX2_DOUBLE),
            "single_transformer_blocks": ("single_blocks", FLUX2_SINGLE),
        },
        FLUX2_OUTSIDE,
    ),
    "AuraFlowTransformer2DModel": Original(
        {
            "joint_transformer_blocks": ("double_layers", AURA_FLOW_JOINT),
            "single_transformer_blocks": ("single_layers", AURA_FLOW_SINGLE),
        },
        AURA_FLOW_OUTSIDE,
    ),
    "Lumina2Transformer2DModel": Original({name: (name, LUMINA2_BLOCK) for name in STREAMS}, LUMINA2_OUTSIDE),
    "ZImageTransformer2DModel": Original(
        {name: (name, Z_IMAGE_BLOCK) for name in STREAMS}, Z_IMAGE_OUTSIDE, others_alike=True
    ),
}
SAME_NAMES = ("QwenImageTransformer2DModel",)  # the original checkpoint has the layers of diffusers
LAST_NORM, CONTEXT_NORM = "norm_out.linear", "norm1_context.linear"


def original_layer(network: str, name: str) -> tuple[str, tuple[str, ...]]:
    """(the layer of the original checkpoint, the layers of diffusers that it fuses) for a layer of diffusers.

    Raises a ValueError for a network or layer whose original name is not known.
    """
    if network in SAME_NAMES:
        return name, (name,)
    if network not in ORIGINALS:
        known = ", ".join((*ORIGINALS, *SAME_NAMES))
        raise ValueError(f"--to lora-comfyui: the original names of {network} are not known; those of {known} are")
    names, block = ORIGINALS[network], re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    if block is None or block[1] not in names.blocks:
        ours, theirs, table, inner = "", "", names.outside, name
    else:
        (listed, table), inner = names.blocks[block[1]], block[3]
        ours, theirs = f"{block[1]}.{block[2]}.", f"{listed}.{block[2]}."
    for layer, parts in table.items():
        if inner in parts:
            return theirs + layer, tuple(ours + part for part in parts)
    if names.others_alike:
        return name, (name,)
    raise ValueError(f"--to lora-comfyui: {name} has no layer of its own in the original checkpoint")


def is_swapped(network: str, name: str, out_features: Mapping[str, int]) -> bool:
    """Whether diffusers has scale before shift in that layer, and the original shift before scale.

    It is so in the last normalisation, and in that of SD3's last block for the text, which has the same width.
    """
    if network in SAME_NAMES:
        return False
    return name == LAST_NORM or (
        name.endswith(f".{CONTEXT_NORM}") and out_features[name] == out_features.get(LAST_NORM)
    )
