"""Adapters with the names of PEFT and of ComfyUI are the same matrices, also to diffusers' own converter."""

from __future__ import annotations

import pytest
import torch

from flowmap.export.lora_formats import comfy_weights, peft_config, peft_weights

RANK, WIDTH = 3, 3072  # FLUX's width, which diffusers' converter has as a constant; the matrices are thin
OUT = {
    **{f"transformer_blocks.0.attn.{name}": WIDTH for name in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0")},
    **{f"transformer_blocks.0.attn.{name}": WIDTH for name in ("add_k_proj", "add_v_proj")},
    **{f"single_transformer_blocks.1.attn.{name}": WIDTH for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.1.proj_mlp": 4 * WIDTH,
    "time_text_embed.timestep_embedder.linear_2": WIDTH,
    "norm_out.linear": 2 * WIDTH,
}
WITHOUT = ("transformer_blocks.0.attn.add_k_proj",)  # a part of a fused layer that has no adapter
EMBEDDING, SWAPPED = "time_text_embed.timestep_embedder.linear_2", "norm_out.linear"
FLUX = "FluxTransformer2DModel"


def adapters(*, biases: bool) -> dict[str, torch.Tensor]:
    """As adapter_weights gives them: the embedding has a bias alone."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, width in OUT.items():
        if name in WITHOUT:
            continue
        scale = 0.0 if name == EMBEDDING else 1.0
        found[f"{name}.lora_A.weight"] = torch.randn(RANK, 5, generator=generator)
        found[f"{name}.lora_B.weight"] = scale * torch.randn(width, RANK, generator=generator)
        if biases:
            found[f"{name}.lora_B.bias"] = (1 - scale) * torch.randn(width, generator=generator)
    return found


def product(weights, name):
    return weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]


def comfy_product(weights, layer):
    """The change of the original layer's weight, as ComfyUI computes it: up down alpha / rank."""
    down = weights[f"diffusion_model.{layer}.lora_down.weight"]
    scale = float(weights[f"diffusion_model.{layer}.alpha"]) / len(down)
    return scale * weights[f"diffusion_model.{layer}.lora_up.weight"] @ down


def test_the_fused_layers_of_the_original_have_the_same_matrices():
    ours = adapters(biases=True)
    theirs = comfy_weights(ours, FLUX, OUT)
    zero = torch.zeros(WIDTH, 5)
    for layer, block, parts in (
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.", ("to_q", "to_k", "to_v")),
        ("double_blocks.0.txt_attn.qkv", "transformer_blocks.0.attn.", ("add_q_proj", None, "add_v_proj")),
        (
            "single_blocks.1.linear1",
            "single_transformer_blocks.1.",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ),
        ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.", ("to_out.0",)),
    ):
        wanted = torch.cat([zero if part is None else product(ours, block + part) for part in parts])
        torch.testing.assert_close(comfy_product(theirs, layer), wanted)
    scale, shift = product(ours, SWAPPED).chunk(2)
    torch.testing.assert_close(comfy_product(theirs, "final_layer.adaLN_modulation.1"), torch.cat([shift, scale]))
    constants = {key: value for key, value in theirs.items() if "diff_b" in key}
    assert list(constants) == ["diffusion_model.time_in.out_layer.diff_b"], "no other bias, and no matrix of zeros"
    assert torch.equal(constants.popitem()[1], ours[f"{EMBEDDING}.lora_B.bias"])
    assert not any("time_in" in key and "lora" in key for key in theirs)


def test_diffusers_own_converter_reads_the_same_matrices():
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    ours = {name: value for name, value in adapters(biases=False).items() if not name.startswith((EMBEDDING, SWAPPED))}
    theirs = utils._convert_kohya_flux_lora_to_diffusers(dict(comfy_weights(ours, FLUX, OUT)))
    names = [name for name in OUT if name not in (EMBEDDING, SWAPPED)]
    assert {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in theirs} == set(names)
    for name in names:
        wanted = torch.zeros(WIDTH, 5) if name in WITHOUT else product(ours, name)
        torch.testing.assert_close(product(theirs, f"transformer.{name}"), wanted)


def test_networks_of_the_same_names_keep_them_and_others_are_refused():
    ours = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(2, 5)}
    ours["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.randn(7, 2)
    width = {"transformer_blocks.0.attn.to_q": 7}
    theirs = comfy_weights(ours, "QwenImageTransformer2DModel", width)
    torch.testing.assert_close(
        comfy_product(theirs, "transformer_blocks.0.attn.to_q"), product(ours, "transformer_blocks.0.attn.to_q")
    )
    with pytest.raises(
        ValueError, match="^--to lora-comfyui: the original names of SD3Transformer2DModel are not known"
    ):
        comfy_weights(ours, "SD3Transformer2DModel", width)


def test_two_adapters_of_a_layer_are_the_sum_of_their_matrices():
    """A style and a few-step adapter, each fused, added as a program adds them to the original's weight."""
    first, second = adapters(biases=True), {name: 0.5 * value for name, value in adapters(biases=True).items()}
    layer, parts = "double_blocks.0.img_attn.qkv", ("to_q", "to_k", "to_v")
    both = sum(comfy_product(comfy_weights(one, FLUX, OUT), layer) for one in (first, second))
    names = [f"transformer_blocks.0.attn.{part}" for part in parts]
    torch.testing.assert_close(both, torch.cat([product(first, name) + product(second, name) for name in names]))


def test_pefts_file_has_the_same_tensors_and_a_configuration_of_scale_one():
    peft = pytest.importorskip("peft")
    ours = adapters(biases=True)
    config = peft.LoraConfig(**{k: v for k, v in peft_config(ours, RANK, "owner/base").items() if k != "peft_type"})
    assert config.r == config.lora_alpha == RANK and config.lora_bias
    assert set(config.target_modules) == set(OUT) - set(WITHOUT)
    assert {name.removeprefix("base_model.model.") for name in peft_weights(ours)} == set(ours)
