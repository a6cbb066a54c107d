"""A LoRA student as a diffusers LoRA: pipe.load_lora_weights(folder) on the stock base pipeline, and nothing of ours.

What the student adds to the time embedding is a constant on an even grid and at a fixed scale (see stock.py). It rides along as the bias of
the adapter on that embedding's last layer, which peft calls lora_bias; as that holds for a whole adapter, every other layer's bias is zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flowmap.base.files import write_tensors
from flowmap.export.plan import Export, Written
from flowmap.export.stock import (
    FAMILIES,
    call_lines,
    check_grid,
    constant_extra,
    has_stock,
    network_of,
    time_embeddings,
    unit_of,
)
from flowmap.export.text import TextParts, sentence_lines, write_text_parts
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import ADAPTER
from flowmap.teachers.autoencoder import Autoencoder

WEIGHTS = "pytorch_lora_weights.safetensors"


def write_lora(plan: Export, folder: Path) -> Written:
    """Fills the folder with the adapters' weights, and gives the lines that load and call them. ValueError where a stock pipeline would differ."""
    config = plan.student.config
    if config.lora is None:
        raise ValueError("--to lora: this student is no LoRA student; take --to diffusers")
    net = config.net
    assert isinstance(net, DiffusersModel)
    if not has_stock(plan):
        raise ValueError(
            f"--to lora: no stock pipeline samples {net.network} on the schedule of {net.scheduler} as this student does; take "
            "--to diffusers --custom, which merges its adapters"
        )
    check_grid(plan)
    _check_autoencoder(plan)
    write_tensors(folder / WEIGHTS, {f"transformer.{name}": value for name, value in adapter_weights(plan).items()})
    text = write_text_parts(plan, folder, of_base=True)
    return Written(_snippet(plan, text), _notes(plan))


@torch.no_grad()
def adapter_weights(plan: Export) -> dict[str, Tensor]:
    """A, B and the bias of B by layer, in diffusers' names; alpha / rank is in B, so that the scale of all is 1, which is what no alpha means."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora = plan.student.config.lora
    assert lora is not None
    net, rank, out = network_of(plan), lora.rank, {}
    extra = constant_extra(plan)
    embeddings = [f"{name}.linear_2" for name, _ in time_embeddings(net.model)] if extra is not None else []
    for name, layer in net.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            out[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
            out[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
        elif name in embeddings:
            out[f"{name}.lora_A.weight"] = torch.zeros(rank, layer.in_features)
            out[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, rank)
    biases = {
        key.replace(".weight", ".bias"): value.new_zeros(len(value)) for key, value in out.items() if ".lora_B." in key
    }
    biases |= {f"{name}.lora_B.bias": extra for name in embeddings}
    return out | (biases if embeddings else {})


def _check_autoencoder(plan: Export) -> None:
    """ValueError unless the base pipeline's own autoencoder decodes as the student's."""
    config = plan.student.config
    if config.autoencoder is None:
        return
    base = config.frozen_base()
    theirs = Autoencoder(source=base.source, revision=base.revision)
    ours = plan.autoencoder()
    assert ours is not None
    if plan.unit or ours.identity() != theirs.identity():
        raise ValueError(
            "--to lora: the base pipeline decodes latents otherwise than this student; take --to diffusers, which merges its adapters"
        )


def _snippet(plan: Export, text: TextParts | None) -> str:
    net, base = network_of(plan), plan.student.config.frozen_base()
    family = FAMILIES[type(net.model).__name__]
    here = Path(base.source).is_dir()
    source = (
        '"path/to/the/base/pipeline"'
        if here
        else f'"{base.source}"' + (f', revision="{base.revision}"' if base.revision else "")
    )
    size = [
        f"{key}={side} * pipe.vae_scale_factor"
        for key, side in zip(("height", "width"), plan.student.config.shape[1:], strict=True)
    ]
    lines = [*sentence_lines(text), f"from diffusers import DiffusionPipeline, {family.scheduler}", ""]
    lines += [f"pipe = DiffusionPipeline.from_pretrained({source})", 'pipe.load_lora_weights("path/to/this/folder")']
    lines += [f"pipe.scheduler = {family.scheduler}(num_train_timesteps={round(unit_of(net))}, shift=1.0)"]
    return "\n".join(
        [*lines, *call_lines(plan, family, size, text, decodes=plan.student.config.autoencoder is not None)]
    )


def _notes(plan: Export) -> tuple[str, ...]:
    model = network_of(plan).model
    note = (
        f"The adapter and what it says of the steps are one file: take num_inference_steps={plan.steps} and no other, a scale of the adapter of 1 "
        "and no other, and this scheduler. peft is needed beside diffusers."
    )
    if any(_lacks_bias(layer) for layer in model.modules()):
        note += " Some layers of this network have no bias: peft says so when the adapter is loaded, and it cannot be fused."
    return (note,)


def _lacks_bias(layer: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer) and layer.get_base_layer().bias is None
