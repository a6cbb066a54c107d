"""Exports a student as a stock diffusers pipeline, without custom code.

A student with a diffusers flow network differs from the stock network by one vector, arrival(t - s) +
guidance((w - 1) / 4), which is added to the time embeddings. On an even grid, t - s = 1/K, and at a fixed scale w, that
vector is constant: it is folded into the embedding's last layer (constants.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import nn

from flowmap.base.files import write_json
from flowmap.export.constants import (
    constant_extra,
    has_second_time,
    last_layers,
    load_weights,
    network_of,
    product_of,
    unit_of,
    with_second_time,
)
from flowmap.export.plan import Export, Written
from flowmap.export.text import PROMPT, TextParts, sentence_lines, write_text_parts
from flowmap.export.vae import ENCODER_KEPT, exported_vae
from flowmap.flow.clock import FlowClock
from flowmap.nets.diffusers_model import DiffusersNet
from flowmap.teachers.autoencoder import FRAMES


@dataclass(frozen=True)
class Family:
    """A network's stock pipeline: the scheduler for the even grid, its empty parts, and the arguments of a call."""

    pipeline: str
    scheduler: str
    empty: tuple[str, ...]
    conditions: tuple[str, ...]
    call: tuple[str, ...] = ("guidance_scale=1.0",)
    prompting: tuple[str, ...] = ()  # extra arguments with prompts, so that they are encoded as in training
    limits: bool = True  # whether it takes max_sequence_length
    zeros: str | None = None  # code for arguments that it needs and our networks do not read
    patch: int = 1  # side of the patches of latents that are channels, which it normalises by the autoencoder's weights
    of_frames: bool = False  # whether its autoencoder is one of videos, which normalises by channel
    trimmed: bool = False  # whether it takes a list of embeddings, of each prompt's real tokens alone
    shifts: bool = True  # whether its decoding reads the autoencoder's shift_factor
    unguided: tuple[str, ...] = ()  # lines that turn off a base pipeline's guidance, where no argument of a call does

    def build_scheduler(self, unit: float) -> diffusers.SchedulerMixin:
        return getattr(diffusers, self.scheduler)(num_train_timesteps=round(unit), shift=1.0)


# FlowMapEulerDiscreteScheduler makes the even grid itself; the pipelines of FLUX and QwenImage pass even sigmas, and a
# `mu` that it does not accept.
NO_SECOND_TEXT = (
    "prompt_embeds_2=prompt_embeds.new_zeros(len(prompt_embeds), 1, pipe.transformer.config.text_embed_2_dim or 1), "
    "prompt_embeds_mask_2=prompt_embeds.new_zeros(len(prompt_embeds), 1)"
)
FAMILIES = {
    "SD3Transformer2DModel": Family(
        pipeline="StableDiffusion3Pipeline",
        scheduler="FlowMapEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        conditions=("prompt_embeds", "pooled_prompt_embeds"),
    ),
    "SanaTransformer2DModel": Family(
        pipeline="SanaPipeline",
        scheduler="FlowMapEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds", "prompt_attention_mask"),
        call=("guidance_scale=1.0", "use_resolution_binning=False"),
        prompting=("complex_human_instruction=None",),
        shifts=False,
    ),
    "FluxTransformer2DModel": Family(
        pipeline="FluxPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        conditions=("prompt_embeds", "pooled_prompt_embeds"),
    ),
    "QwenImageTransformer2DModel": Family(
        pipeline="QwenImagePipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds", "prompt_embeds_mask"),
        call=("true_cfg_scale=1.0",),
        of_frames=True,
    ),
    "ZImageTransformer2DModel": Family(
        pipeline="ZImagePipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds",),
        call=("guidance_scale=0.0",),  # there 0 is no guidance
        trimmed=True,
    ),
    "Flux2Transformer2DModel": Family(
        pipeline="Flux2KleinPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds",),
        patch=2,
    ),
    "HunyuanImageTransformer2DModel": Family(
        pipeline="HunyuanImagePipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        conditions=("prompt_embeds", "prompt_embeds_mask"),
        call=(),
        shifts=False,
        limits=False,
        zeros=NO_SECOND_TEXT,
        unguided=("pipe.guider = pipe.ocr_guider = None",),
    ),
    "Lumina2Transformer2DModel": Family(
        pipeline="Lumina2Pipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds", "prompt_attention_mask"),
    ),
    "AuraFlowTransformer2DModel": Family(
        pipeline="AuraFlowPipeline",
        scheduler="FlowMapEulerDiscreteScheduler",
        empty=("text_encoder", "tokenizer"),
        conditions=("prompt_embeds", "prompt_attention_mask"),
        shifts=False,
    ),
}
FLUX2_DEV = Family(  # with guidance_embeds
    pipeline="Flux2Pipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    empty=("text_encoder", "tokenizer"),
    conditions=("prompt_embeds",),
    patch=2,
)
EMBEDDED = ("FluxPipeline", "Flux2Pipeline")  # their guidance_scale is an input of the network
TRIMMED = "prompt_embeds=[row[seen.bool()] for row, seen in zip(prompt_embeds, prompt_attention_mask)]"


def has_stock(plan: Export) -> bool:
    """Whether a stock diffusers pipeline can sample the student's network from noise as we do."""
    net = plan.student.flow_map.net
    return isinstance(net, DiffusersNet) and isinstance(net.clock, FlowClock) and type(net.model).__name__ in FAMILIES


def family_of(plan: Export) -> Family:
    """The stock pipeline of the student's network, which must have one."""
    model = network_of(plan).model
    name = type(model).__name__
    return FLUX2_DEV if name == "Flux2Transformer2DModel" and model.config.guidance_embeds else FAMILIES[name]


def write_stock(plan: Export, folder: Path) -> Written:
    """Write the pipeline to the folder, and return the Python lines that load and call it.

    Raises a ValueError if the stock pipeline would give other samples than the student.
    """
    check_grid(plan)
    net = network_of(plan)
    family = family_of(plan)
    vae = _vae(plan, family)
    scheduler = family.build_scheduler(unit_of(net))
    transformer = with_second_time(plan) if has_second_time(plan) else folded(plan)
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": vae, **dict.fromkeys(family.empty)}
    pipe = getattr(diffusers, family.pipeline)(**parts)
    for name in ("transformer", "scheduler", *(["vae"] if vae is not None else [])):
        parts[name].save_pretrained(folder / name)
    text = write_text_parts(plan, folder, for_pipeline=family.pipeline)
    pipe.save_config(folder)  # model_index.json, without text encoders
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | (text.index if text and text.pipeline else {}))
    return Written(_snippet(plan, family, pipe, text), _notes(plan, text))


def check_grid(plan: Export) -> None:
    """Raise a ValueError unless all steps have length 1/K and add no noise, so that the network has one interval."""
    even = [1 - i / plan.steps for i in range(plan.steps + 1)]
    times = plan.times
    if max(abs(t - e) for t, e in zip(times, even, strict=True)) > 1e-6:
        grid = ", ".join(f"{t:.4g}" for t in times)
        raise ValueError(
            f"--steps: the grid of {plan.steps} steps is {grid}: the network of a stock pipeline is for one interval; "
            "take --custom, or a number of steps with an even grid from 1 to 0"
        )
    if plan.gamma > 0 and plan.steps > 1:
        what = f"gamma = {plan.gamma:g} puts noise back between steps, which no stock scheduler does"
        raise ValueError(f"--steps: {what}; take --custom or --steps 1")


@torch.no_grad()
def folded(plan: Export) -> nn.Module:
    """The stock network with the same output as the student's at each step of the plan, on the CPU."""
    net = network_of(plan)
    model = type(net.model).from_config(net.model.config)
    load_weights(model, net.model.state_dict())
    extra = constant_extra(plan)
    if extra is not None:
        for name in last_layers(model):
            layer = model.get_submodule(name)
            if layer.bias is None:
                a, b = product_of(plan, model, name)
                layer.weight += (b @ a).to(layer.weight)
            else:
                layer.bias += extra.to(layer.bias)
    return model.eval().cpu()


def _vae(plan: Export, family: Family) -> nn.Module | None:
    decodes_itself = family.patch > 1 or family.of_frames
    vae = exported_vae(plan, shifts=family.shifts, by_itself=decodes_itself)
    if vae is None and family.pipeline == "Flux2KleinPipeline":
        what = f"{family.pipeline} needs an autoencoder even for latents, and this student has none"
        raise ValueError(f"--to diffusers: {what}; take --custom")
    if vae is not None and family.of_frames and type(vae).__name__ not in FRAMES:
        what = f"{family.pipeline} decodes with an autoencoder for video, which {type(vae).__name__} is not"
        raise ValueError(f"autoencoder: {what}; take --custom")
    return vae


def _notes(plan: Export, text: TextParts | None) -> tuple[str, ...]:
    notes = [f"Take num_inference_steps={plan.steps} and no other: the network is for steps of 1/{plan.steps}."]
    if has_second_time(plan):
        notes = ["Any num_inference_steps: the network reads the time at which a step arrives."]
    if text is None:
        notes[0] += (
            " Text encoders are not in this folder: give embeddings, or hand the teacher's text encoders and "
            "tokenizers to from_pretrained."
        )
    elif text.pipeline is None:
        notes[0] += " This pipeline cannot call the text encoder of the folder itself: the lines above do."
    return (*notes, *([ENCODER_KEPT] if plan.unit else []))


def _snippet(plan: Export, family: Family, pipe, text: TextParts | None) -> str:
    shape, encoders = plan.student.config.shape, [] if text is None or text.pipeline is None else text.index
    scale = family.patch * pipe.vae_scale_factor
    size = [f"{key}={side * scale}" for key, side in zip(("height", "width"), shape[1:], strict=True)]
    empty = [name for name in family.empty if name not in encoders] + (["vae"] if pipe.vae is None else [])
    lines = [*sentence_lines(text), "from diffusers import DiffusionPipeline", ""]
    if empty:
        lines += [f"not_here = dict.fromkeys([{', '.join(map(_quoted, empty))}])"]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{", **not_here" * bool(empty)})']
    return "\n".join([*lines, *call_lines(plan, family, size, text, decodes=pipe.vae is not None)])


def _quoted(name: str) -> str:
    return f'"{name}"'


def call_lines(plan: Export, family: Family, size: list[str], text: TextParts | None, *, decodes: bool) -> list[str]:
    """The card's lines that call a stock pipeline: with a prompt if it has text encoders, otherwise with embeddings."""
    config, call = network_of(plan).model.config, list(family.call)
    if config.get("guidance_embeds") and plan.guidance is not None and family.pipeline in EMBEDDED:
        call = [f"guidance_scale={plan.guidance:g}"]
    if text is not None and text.pipeline is not None:
        given = [f'prompt="{PROMPT}"', *family.prompting]
        given += [f"max_sequence_length={text.max_tokens}"] if text.max_tokens is not None and family.limits else []
    else:
        given = [TRIMMED] if family.trimmed else [f"{key}={key}" for key in family.conditions]
        given += [] if family.zeros is None else [family.zeros]
    kind = "" if decodes else ', output_type="latent"'
    lines = ["images = pipe(", f"    {', '.join(given)},"]
    return [*lines, f"    num_inference_steps={plan.steps}, {', '.join([*call, *size])}{kind},", ").images"]
