"""A student as a stock diffusers pipeline, with no code of ours in it.

A diffusers flow network that became a student differs from its stock class by one vector, arrival(t - s) + guidance((w - 1) / 4), that is
added to what its time embeddings give. On an even grid, t - s = 1/K, and at a fixed scale w that vector is a constant: it folds into the
bias of the embeddings' last layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from flowmap.base.files import write_json
from flowmap.export.plan import Export, Written
from flowmap.export.text import PROMPT, TextParts, sentence_lines, write_text_parts
from flowmap.export.vae import ENCODER_KEPT, exported_vae
from flowmap.flow.clock import FlowClock
from flowmap.nets.diffusers_model import TIME_EMBEDDINGS, DiffusersNet
from flowmap.nets.embed import branches


@dataclass(frozen=True)
class Family:
    """A network's stock pipeline: the scheduler that walks the even grid in it, the parts that stay empty, and how it is called."""

    pipeline: str
    scheduler: str
    empty: tuple[str, ...]
    conditions: tuple[str, ...]
    call: tuple[str, ...] = ("guidance_scale=1.0",)
    prompting: tuple[str, ...] = ()  # what a call with prompts is told besides, so that they are encoded as in training
    shifts: bool = True  # its decoding reads the autoencoder's shift_factor

    def build_scheduler(self, unit: float) -> diffusers.SchedulerMixin:
        return getattr(diffusers, self.scheduler)(num_train_timesteps=round(unit), shift=1.0)


# FlowMapEulerDiscreteScheduler makes the even grid itself; FLUX and QwenImage hand over even sigmas, and a `mu` that it does not take.
FAMILIES = {
    "SD3Transformer2DModel": Family(
        "StableDiffusion3Pipeline", "FlowMapEulerDiscreteScheduler",
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        ("prompt_embeds", "pooled_prompt_embeds"),
    ),
    "SanaTransformer2DModel": Family(
        "SanaPipeline", "FlowMapEulerDiscreteScheduler", ("text_encoder", "tokenizer"), ("prompt_embeds", "prompt_attention_mask"),
        ("guidance_scale=1.0", "use_resolution_binning=False"), ("complex_human_instruction=None",), shifts=False,
    ),
    "FluxTransformer2DModel": Family(
        "FluxPipeline", "FlowMatchEulerDiscreteScheduler", ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        ("prompt_embeds", "pooled_prompt_embeds"),
    ),
    "QwenImageTransformer2DModel": Family(
        "QwenImagePipeline", "FlowMatchEulerDiscreteScheduler", ("text_encoder", "tokenizer"), ("prompt_embeds", "prompt_embeds_mask"),
        ("true_cfg_scale=1.0",),
    ),
}  # fmt: skip


def has_stock(plan: Export) -> bool:
    """The student's network is of a family that diffusers samples from noise as we do."""
    net = plan.student.flow_map.net
    return isinstance(net, DiffusersNet) and isinstance(net.clock, FlowClock) and type(net.model).__name__ in FAMILIES


def network_of(plan: Export) -> DiffusersNet:
    """The student's network, one of diffusers'."""
    net = plan.student.flow_map.net
    assert isinstance(net, DiffusersNet)
    return net


def unit_of(net: DiffusersNet) -> float:
    """What the network embeds at t = 1."""
    assert isinstance(net.clock, FlowClock)  # has_stock has asked
    return net.clock.unit


def write_stock(plan: Export, folder: Path) -> Written:
    """Fills the folder with the pipeline, and gives the Python lines that load and call it. ValueError where a stock pipeline would differ."""
    check_grid(plan)
    net = network_of(plan)
    family = FAMILIES[type(net.model).__name__]
    vae = _vae(plan, family)
    scheduler = family.build_scheduler(unit_of(net))
    parts = {"transformer": folded(plan), "scheduler": scheduler, "vae": vae, **dict.fromkeys(family.empty)}
    pipe = getattr(diffusers, family.pipeline)(**parts)
    for name in ("transformer", "scheduler", *(["vae"] if vae is not None else [])):
        parts[name].save_pretrained(folder / name)
    text = write_text_parts(plan, folder, for_pipeline=family.pipeline)
    pipe.save_config(folder)  # model_index.json, of the parts that are none of its text encoders
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | (text.index if text and text.pipeline else {}))
    return Written(_snippet(plan, family, pipe, text), _notes(plan, text))


def check_grid(plan: Export) -> None:
    """ValueError unless every step of the plan is 1/K long and puts no noise back: then the network is told one interval."""
    even = [1 - i / plan.steps for i in range(plan.steps + 1)]
    times = plan.times
    if max(abs(t - e) for t, e in zip(times, even, strict=True)) > 1e-6:
        grid = ", ".join(f"{t:.4g}" for t in times)
        raise ValueError(
            f"--steps: the grid of {plan.steps} steps is {grid}: a stock pipeline can walk it, but its network is told one interval; "
            "take --custom, or a number of steps whose grid is even from 1 to 0"
        )
    if plan.gamma > 0 and plan.steps > 1:
        raise ValueError(
            f"--steps: gamma = {plan.gamma:g} puts noise back between steps, which no stock scheduler does; take --custom or --steps 1"
        )


@torch.no_grad()
def folded(plan: Export) -> nn.Module:
    """The stock network that says at each step of the plan what the student's says, on the CPU."""
    net = network_of(plan)
    model = type(net.model).from_config(net.model.config)
    load_weights(model, net.model.state_dict())
    extra = constant_extra(plan)
    if extra is not None:
        for _, module in time_embeddings(model):
            module.linear_2.bias += extra.to(module.linear_2.bias)
    return model.eval().cpu()


def time_embeddings(model: nn.Module) -> list[tuple[str, Any]]:
    """The model's time embeddings by name. ValueError where one does not end in a layer with a bias."""
    found = [(name, module) for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS]
    if any(getattr(module, "post_act", None) is not None or module.linear_2.bias is None for _, module in found):
        raise ValueError(f"--to: a time embedding of {type(model).__name__} does not end in a bias; take --custom")
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """ValueError where the weights are not those of the plain network: adapters (LoRA) that are not merged, say."""
    try:
        model.load_state_dict({key: value.cpu() for key, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"--student: its weights are not those of a plain {type(model).__name__}; merge its adapters first"
        ) from error


def constant_extra(plan: Export) -> Tensor | None:
    """What the branches add to the time embeddings at every step of the plan, (width,); None without branches."""
    net = network_of(plan)
    t = torch.ones(1, device=plan.student.device)
    cond = {} if plan.guidance is None else {"guidance": plan.guidance * t}
    extra = branches(net.arrival, net.guidance, t, t - 1 / plan.steps, cond)
    return None if extra is None else extra[0]


def _vae(plan: Export, family: Family) -> nn.Module | None:
    vae = exported_vae(plan, shifts=family.shifts)
    if vae is not None and family.pipeline == "QwenImagePipeline":
        raise ValueError(
            f"autoencoder: {family.pipeline} decodes with an autoencoder for video, which {type(vae).__name__} is not; take --custom"
        )
    return vae


def _notes(plan: Export, text: TextParts | None) -> tuple[str, ...]:
    notes = [f"Take num_inference_steps={plan.steps} and no other: the network is told steps of 1/{plan.steps}."]
    if text is None:
        notes[0] += (
            " Text encoders are not in this folder: give embeddings, or hand the teacher's text encoders and tokenizers to from_pretrained."
        )
    elif text.pipeline is None:
        notes[0] += " This pipeline cannot call the text encoder of the folder itself: the lines above do."
    return (*notes, *([ENCODER_KEPT] if plan.unit else []))


def _snippet(plan: Export, family: Family, pipe, text: TextParts | None) -> str:
    shape, encoders = plan.student.config.shape, [] if text is None or text.pipeline is None else text.index
    size = [f"{key}={side * pipe.vae_scale_factor}" for key, side in zip(("height", "width"), shape[1:], strict=True)]
    empty = [name for name in family.empty if name not in encoders] + (["vae"] if pipe.vae is None else [])
    lines = [*sentence_lines(text), "from diffusers import DiffusionPipeline", ""]
    if empty:
        lines += [f"not_here = dict.fromkeys([{', '.join(map(_quoted, empty))}])"]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{", **not_here" * bool(empty)})']
    return "\n".join([*lines, *call_lines(plan, family, size, text, decodes=pipe.vae is not None)])


def _quoted(name: str) -> str:
    return f'"{name}"'


def call_lines(plan: Export, family: Family, size: list[str], text: TextParts | None, *, decodes: bool) -> list[str]:
    """The card's lines that call a stock pipeline: with a prompt where it has the text encoders, else with their embeddings."""
    config, call = network_of(plan).model.config, list(family.call)
    if config.get("guidance_embeds") and plan.guidance is not None and family.pipeline == "FluxPipeline":
        call = [f"guidance_scale={plan.guidance:g}"]
    if text is not None and text.pipeline is not None:
        given = [f'prompt="{PROMPT}"', *family.prompting]
        given += [f"max_sequence_length={text.max_tokens}"] if text.max_tokens is not None else []
    else:
        given = [f"{key}={key}" for key in family.conditions]
    kind = "" if decodes else ', output_type="latent"'
    lines = ["images = pipe(", f"    {', '.join(given)},"]
    return [*lines, f"    num_inference_steps={plan.steps}, {', '.join([*call, *size])}{kind},", ").images"]
