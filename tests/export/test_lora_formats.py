"""Adapters with the names of PEFT and of ComfyUI are the same matrices, also to diffusers' own converter."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file

from flowmap.export import export
from flowmap.export.lora import WEIGHTS
from flowmap.export.lora_formats import comfy_weights, peft_config, peft_weights
from flowmap.export.original_names import original_layer
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet
from flowmap.nets.lora import Base, LoRA
from flowmap.nets.lora_file import add_file
from flowmap.nets.pretrained import _json
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student
from tests.support.tiny_nets import (
    POOLED,
    TEXT,
    aura_flow,
    diffusers,
    flux2,
    lumina2,
    sana,
    sd3,
    with_random_weights,
    z_image,
)

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
        ValueError, match="^--to lora-comfyui: the original names of DiTTransformer2DModel are not known; those of Flux"
    ):
        comfy_weights(ours, "DiTTransformer2DModel", width)
    with pytest.raises(ValueError, match="^--to lora-comfyui: transformer_blocks.0.attn.to_q has no layer of its own"):
        comfy_weights(ours, "SanaTransformer2DModel", width)


def with_two_attentions():
    from diffusers import SD3Transformer2DModel

    config = dict(sd3().config) | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return SD3Transformer2DModel.from_config(config)


def wide_lumina2():
    """Its converter has the published model's widths as constants."""
    from diffusers import Lumina2Transformer2DModel

    config = dict(lumina2().config) | dict(hidden_size=2304, num_attention_heads=24, num_kv_heads=8)
    return Lumina2Transformer2DModel.from_config(
        config | dict(axes_dim_rope=(32, 32, 32), ffn_dim_multiplier=0.001, multiple_of=8)
    )


def guided_flux2():
    return flux2(guidance_embeds=True)


@pytest.mark.parametrize(
    "make",
    [sd3, with_two_attentions, sana, guided_flux2, z_image, aura_flow]
    + [pytest.param(wide_lumina2, marks=pytest.mark.slow)],  # at its own width, the only one that is converted
    ids=lambda make: make.__name__,
)
def test_diffusers_own_conversion_of_the_whole_checkpoint_gives_the_same_matrices(make):
    """Adapters of every layer, added to an original checkpoint of zeros, which diffusers then converts."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    model, generator, ours, widths = make(), torch.Generator().manual_seed(0), {}, {}
    network = type(model).__name__
    convert = {
        "SD3Transformer2DModel": utils.convert_sd3_transformer_checkpoint_to_diffusers,
        "SanaTransformer2DModel": utils.convert_sana_transformer_to_diffusers,
        "Flux2Transformer2DModel": utils.convert_flux2_transformer_checkpoint_to_diffusers,
        "ZImageTransformer2DModel": utils.convert_z_image_transformer_checkpoint_to_diffusers,
        "Lumina2Transformer2DModel": utils.convert_lumina2_to_diffusers,
        "AuraFlowTransformer2DModel": utils.convert_auraflow_transformer_checkpoint_to_diffusers,
    }[network]
    layers = {
        name: layer for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not name.endswith("conv_depth")
    }  # fmt: skip
    for name, layer in layers.items():
        out, *inside = layer.weight.shape
        widths[name], ones = out, [1] * (len(inside) - 1)
        ours[f"{name}.lora_A.weight"] = torch.randn(RANK, *inside, generator=generator)
        ours[f"{name}.lora_B.weight"] = torch.randn(out, RANK, *ones, generator=generator)
        if layer.bias is not None:
            ours[f"{name}.lora_B.bias"] = torch.randn(out, generator=generator)
    checkpoint = _zeros(model, layers, network)
    for key, value in (theirs := comfy_weights(ours, network, widths)).items():
        name = key.removeprefix("diffusion_model.")
        if name.endswith(".lora_up.weight"):
            layer = name.removesuffix(".lora_up.weight")
            down = theirs[f"diffusion_model.{layer}.lora_down.weight"]
            assert float(theirs[f"diffusion_model.{layer}.alpha"]) == len(down), "the scale is 1"
            checkpoint[f"{layer}.weight"] += (value.flatten(1) @ down.flatten(1)).reshape(
                checkpoint[f"{layer}.weight"].shape
            )
        elif name.endswith(".diff_b"):
            checkpoint[f"{name.removesuffix('.diff_b')}.bias"] += value
    found = convert(checkpoint)
    for name, layer in layers.items():
        up, down = ours[f"{name}.lora_B.weight"], ours[f"{name}.lora_A.weight"]
        wanted = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        torch.testing.assert_close(found[f"{name}.weight"], wanted, msg=lambda text, name=name: f"{name}: {text}")
        if layer.bias is not None:
            assert torch.equal(found[f"{name}.bias"], ours[f"{name}.lora_B.bias"]), name


def _zeros(model, layers, network) -> dict[str, torch.Tensor]:
    """An original checkpoint of zeros, in which layers that it fuses are one."""
    found = {}
    for name in layers:
        layer, parts = original_layer(network, name)
        if parts[0] == name:
            for end in ("weight", "bias"):
                rows = [getattr(layers[part], end) for part in parts]
                found |= {} if rows[0] is None else {f"{layer}.{end}": torch.cat([torch.zeros_like(r) for r in rows])}
    blank = torch.zeros(1)
    if network == "AuraFlowTransformer2DModel":
        return found | {"positional_encoding": blank}
    if network not in ("SanaTransformer2DModel", "SD3Transformer2DModel"):
        return found
    blocks = range(len(model.transformer_blocks))
    if network.startswith("Sana"):
        names = ["pos_embed", "y_embedder.y_embedding", "attention_y_norm.weight", "final_layer.scale_shift_table"]
        names += [f"blocks.{i}.scale_shift_table" for i in blocks]
        names += [f"blocks.{i}.mlp.depth_conv.conv.{end}" for i in blocks for end in ("weight", "bias")]
    else:
        qk = [f"{kind}.attn.{ln}" for kind in ("x_block", "context_block") for ln in ("ln_q", "ln_k")]
        qk += ["x_block.attn2.ln_q", "x_block.attn2.ln_k"]
        normed = any(".norm_q" in name for name, _ in model.named_parameters())
        names = ["pos_embed", *(f"joint_blocks.{i}.{one}.weight" for i in blocks for one in qk if normed)]
        if not normed:
            assert not any(".ln_" in name for name in names)
        names = [n for n in names if "attn2" not in n or n.replace("ln_q", "qkv").replace("ln_k", "qkv") in found]
    return found | dict.fromkeys(names, blank)


def test_a_style_and_a_few_step_adapter_reproduce_the_student_in_diffusers(tmp_path):
    """The student's base is the stock base with the style; both adapters on the stock base are the student."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    stock = with_random_weights(sd3(), 0.15)
    style = tmp_path / "style.safetensors"
    tensors = {}
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):  # one is adapted twice
        out, width = stock.get_parameter(f"{layer}.weight").shape
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(RANK, width)
        tensors[f"transformer.{layer}.lora_B.weight"] = 0.3 * torch.randn(out, RANK)
    save_file(tensors, style)
    scheduler = json.dumps({"num_train_timesteps": 1000, "shift": 1.0})
    spec = DiffusersModel("SD3Transformer2DModel", _json(stock.config), "FlowMatchEulerDiscreteScheduler", scheduler)
    student = _student(spec, stock, style)
    out = export(student, tmp_path / "out", to="lora", steps=1, guidance=2.0)
    card = (out / "README.md").read_text()
    assert 'pipe.set_adapters(["teacher", "few_step"], [0.5, 1.0])' in card
    assert "relative to the base with the LoRA style at scale 0.5" in card and str(tmp_path) not in card
    shutil.copy(out / WEIGHTS, tmp_path / "few_step.safetensors")
    x, text, pooled = torch.randn(5, 4, 8, 8), torch.randn(5, 7, TEXT), torch.randn(5, POOLED)
    one, zero, pipeline = torch.ones(5), torch.zeros(5), diffusers.StableDiffusion3Pipeline
    cond = {"text": text, "pooled": pooled, "guidance": 2.0 * one}
    with torch.no_grad():
        wanted = student.flow_map.net(x, one, zero, cond)
        call = dict(hidden_states=x, timestep=1000 * one, encoder_hidden_states=text, pooled_projections=pooled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of adapters with a bias
            for name in ("style", "few_step"):
                state = pipeline.lora_state_dict(str(tmp_path), weight_name=f"{name}.safetensors")
                pipeline.load_lora_into_transformer(state, transformer=stock, adapter_name=name)
        for names, scales, same in (
            (["style", "few_step"], [0.5, 1.0], True),
            (["few_step"], [1.0], False),
            (["style", "few_step"], [1.0, 1.0], False),
        ):
            stock.set_adapters(names, scales)
            found = stock(**call).sample
            # float32 sums in another order
            assert bool((found - wanted).abs().max() < 1e-4 * wanted.abs().max()) is same, (names, scales)


def _student(spec, stock, style) -> Student:
    """A LoRA student with random adapters and branches, whose base has half of the style."""
    lora = LoRA(2, 5.0, ("to_q", "to_out.0"))
    base = Base("owner/base", lora=str(style.with_suffix("")), lora_scale=0.5)
    config = StudentConfig(spec, Deterministic(), (4, 8, 8), guidance=(1.0, 3.0, 2.0), lora=lora, base=base)
    net = DiffusersNet(copy.deepcopy(stock), *spec.clock(), arrival=False, guidance=False)
    add_file(net.model, style, 0.5, "teacher.lora")
    flow_map = config.build(net).eval()
    for parameter in flow_map.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.detach() + 0.3 * torch.randn_like(parameter)
    return Student(config, flow_map.requires_grad_(False))


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
