"""Exports a LoRA student as a diffusers LoRA, for pipe.load_lora_weights(folder) on the stock base pipeline.

On an even grid and at a fixed scale the student adds a constant to the time embedding (see stock.py). It is stored as
the bias of the adapter on that embedding's last layer (peft's lora_bias). An adapter has biases on all layers or
none, so the biases of the other layers are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmap.base.files import write_json, write_tensors
from flowmap.base.hub import is_repository
from flowmap.export.constants import constant_extra, has_second_time, last_layers, network_of, product_of, unit_of
from flowmap.export.lora_formats import comfy_weights, peft_config, peft_weights
from flowmap.export.plan import Export, Written
from flowmap.export.stock import (
    Family,
    call_lines,
    check_grid,
    family_of,
    has_stock,
)
from flowmap.export.text import TextParts, sentence_lines, write_text_parts
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import ADAPTER, Base
from flowmap.teachers.autoencoder import Autoencoder

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMFY_WEIGHTS = "comfyui_lora.safetensors"


def write_lora(plan: Export, folder: Path) -> Written:
    """Write the adapters' weights in diffusers' format, and return the lines that load and call them.

    Raises a ValueError if the stock pipeline would give other samples than the student.
    """
    _check(plan)
    write_tensors(folder / WEIGHTS, {f"transformer.{name}": value for name, value in adapter_weights(plan).items()})
    text = write_text_parts(plan, folder, of_base=True)
    return Written(_snippet(plan, text), _notes(plan))


def write_peft(plan: Export, folder: Path) -> Written:
    """Write adapter_model.safetensors and adapter_config.json, and return the lines that load them with peft.

    Raises the ValueErrors of write_lora.
    """
    _check(plan)
    base, lora = plan.student.config.frozen_base(), plan.student.config.lora
    assert lora is not None
    weights = adapter_weights(plan)
    write_tensors(folder / PEFT_WEIGHTS, peft_weights(weights))
    write_json(folder / PEFT_CONFIG, peft_config(weights, lora.rank, base.source))
    family = family_of(plan)
    source = "path/to/the/base/pipeline" if Path(base.source).is_dir() else base.source
    lines = ["from diffusers import DiffusionPipeline", "from peft import PeftModel", ""]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("{source}")']
    if base.lora is not None:
        if not _loads(family):
            raise ValueError(f"--to lora-peft: {family.pipeline} loads no LoRA of the base; take --to lora")
        lines += [f"pipe.load_lora_weights({_lora_source(base)})", f"pipe.fuse_lora(lora_scale={base.lora_scale:g})"]
        lines += ["pipe.unload_lora_weights()"]
    lines += ['pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "path/to/this/folder")']
    lines += family.unguided
    return Written("\n".join(lines), (*_notes(plan), f"Sample with {_scheduler(plan, family)}."))


def write_comfyui(plan: Export, folder: Path) -> Written:
    """Write comfyui_lora.safetensors with the original checkpoint's layers, and return the lines that read it.

    Raises the ValueErrors of write_lora, and one for a network whose original names are not known.
    """
    _check(plan)
    model = network_of(plan).model
    widths = {name: layer.out_features for name, layer in model.named_modules() if hasattr(layer, "out_features")}
    weights = comfy_weights(adapter_weights(plan), type(model).__name__, widths)
    write_tensors(folder / COMFY_WEIGHTS, weights)
    lines = ["from safetensors.torch import load_file", "", f'load_file("path/to/this/folder/{COMFY_WEIGHTS}")']
    note = (
        f"Copy {COMFY_WEIGHTS} to ComfyUI's models/loras and load it with strength 1. The adapter depends on the "
        f"number of steps: sample with {plan.steps} steps of Euler on even sigmas, and cfg 1."
    )
    return Written("\n".join(lines), (note, *_relative(plan)))


def _check(plan: Export) -> None:
    """Raise a ValueError if the stock pipeline would give other samples than the student."""
    config = plan.student.config
    if config.lora is None:
        raise ValueError("--to lora: this student is no LoRA student; take --to diffusers")
    net = config.net
    assert isinstance(net, DiffusersModel)
    if not has_stock(plan):
        raise ValueError(
            f"--to lora: no stock pipeline samples {net.network} on the schedule of {net.scheduler} "
            "as this student does; take --to diffusers --custom, which merges its adapters"
        )
    check_grid(plan)
    _check_autoencoder(plan)


@torch.no_grad()
def adapter_weights(plan: Export) -> dict[str, Tensor]:
    """A, B and the bias of B by layer, with diffusers' names.

    B is multiplied by alpha / rank, so that the scale is 1, as diffusers assumes without alpha.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora = plan.student.config.lora
    assert lora is not None
    net, out = network_of(plan), {}
    extra = None if has_second_time(plan) else constant_extra(plan)
    embeddings = last_layers(net.model) if net.arrival is not None or net.guidance is not None else []
    for name, layer in net.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            out[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
            out[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
        elif name in embeddings:
            out[f"{name}.lora_A.weight"] = torch.zeros(lora.rank, layer.in_features)
            out[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, lora.rank)
    with_bias = [name for name in embeddings if extra is not None and _base_of(net.model, name).bias is not None]
    for name in embeddings:
        if name not in with_bias:
            out |= _product(plan, name, out)
    second = {key: value for key, value in out.items() if ".lora_B." in key}
    biases = {key.replace(".weight", ".bias"): value.new_zeros(len(value)) for key, value in second.items()}
    biases |= {f"{name}.lora_B.bias": extra for name in with_bias}
    return out | (biases if with_bias else {})


def _base_of(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = model.get_submodule(name)
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _product(plan: Export, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B of a layer, whose product adds to what the layer gives what the branches do, at every step.

    Raises a ValueError if the student has an adapter there, or too small a rank.
    """
    a, b = (weights[f"{name}.lora_{part}.weight"].clone() for part in "AB")
    if b.any():
        raise ValueError(f"--to lora: {name} has an adapter, and the steps need its place; take --to diffusers")
    first, second = product_of(plan, network_of(plan).model, name)
    if len(first) > len(a):
        what = f"{len(first)} steps need adapters of that rank, and this student's have {len(a)}"
        raise ValueError(f"--steps: {what}; take fewer, or --to diffusers, which is for any number")
    a[: len(first)], b[:, : len(first)] = first, second
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _check_autoencoder(plan: Export) -> None:
    """Raise a ValueError unless the base pipeline's autoencoder decodes as the student's."""
    config = plan.student.config
    if config.autoencoder is None:
        return
    base = config.frozen_base()
    theirs = Autoencoder(source=base.source, revision=base.revision)
    ours = plan.autoencoder()
    assert ours is not None
    if plan.unit or ours.identity() != theirs.identity():
        what = "the base pipeline decodes latents otherwise than this student"
        raise ValueError(f"--to lora: {what}; take --to diffusers, which merges its adapters")


def _snippet(plan: Export, text: TextParts | None) -> str:
    base = plan.student.config.frozen_base()
    family = family_of(plan)
    here = Path(base.source).is_dir()
    revision = f', revision="{base.revision}"' if base.revision else ""
    source = '"path/to/the/base/pipeline"' if here else f'"{base.source}"{revision}'
    height, width = (family.patch * side for side in plan.student.config.shape[1:])
    size = [f"height={height} * pipe.vae_scale_factor", f"width={width} * pipe.vae_scale_factor"]
    lines = [*sentence_lines(text), f"from diffusers import DiffusionPipeline, {family.scheduler}", ""]
    lines += [f"pipe = DiffusionPipeline.from_pretrained({source})"]
    part, load = ("pipe", "load_lora_weights") if _loads(family) else ("pipe.transformer", "load_lora_adapter")
    named = "" if _loads(family) else f', weight_name="{WEIGHTS}"'
    if base.lora is None:
        lines += [f'{part}.{load}("path/to/this/folder"{named})']
    else:
        lines += [f'{part}.{load}({_lora_source(base)}, adapter_name="teacher")']
        lines += [f'{part}.{load}("path/to/this/folder", adapter_name="few_step"{named})']
        lines += [f'{part}.set_adapters(["teacher", "few_step"], [{base.lora_scale:g}, 1.0])']
    lines += [f"pipe.scheduler = {_scheduler(plan, family)}", *family.unguided]
    decodes = plan.student.config.autoencoder is not None
    return "\n".join([*lines, *call_lines(plan, family, size, text, decodes=decodes)])


def _loads(family: Family) -> bool:
    """Whether the pipeline loads LoRAs itself; otherwise its network does (HunyuanImage)."""
    import diffusers

    return hasattr(getattr(diffusers, family.pipeline), "load_lora_weights")


def _lora_source(base: Base) -> str:
    """The LoRA in the student's base, as an argument of load_lora_weights."""
    assert base.lora is not None
    return f'"{base.lora}"' if is_repository(base.lora) and not Path(base.lora).exists() else '"path/to/the/lora"'


def _relative(plan: Export) -> tuple[str, ...]:
    """The note that the adapter is relative to a base with a LoRA; none without one."""
    base = plan.student.config.frozen_base()
    if base.lora is None:
        return ()
    name = base.lora if is_repository(base.lora) and not Path(base.lora).exists() else Path(base.lora).name
    what = f"the base with the LoRA {name} at scale {base.lora_scale:g}, which its teacher had"
    return (f"The adapter is relative to {what}: load both. With another scale of that LoRA it is untested.",)


def _scheduler(plan: Export, family: Family) -> str:
    return f"{family.scheduler}(num_train_timesteps={round(unit_of(network_of(plan)))}, shift=1.0)"


def _notes(plan: Export) -> tuple[str, ...]:
    model = network_of(plan).model
    note = (
        f"The adapter depends on the number of steps: take num_inference_steps={plan.steps} and no other, "
        "a scale of the adapter of 1 and no other, and this scheduler. peft is needed besides diffusers."
    )
    biased = not has_second_time(plan) and any(_base_of(model, n).bias is not None for n in last_layers(model))
    if biased and any(_lacks_bias(layer) for layer in model.modules()):
        note += " Some layers of this network have no bias: peft warns when loading the adapter, which cannot be fused."
    return (note, *_relative(plan))


def _lacks_bias(layer: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer) and layer.get_base_layer().bias is None
