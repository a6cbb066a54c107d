"""A student as a stock diffusers pipeline, with no code of ours in it.

A diffusers flow network that became a student differs from its stock class by one vector, arrival(t - s) + guidance((w - 1) / 4), that is
added to what its time embeddings give. On an even grid, t - s = 1/K, and at a fixed scale w that vector is a constant: it folds into the
bias of the embeddings' last layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from flowmap.export.plan import Export
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
        ("guidance_scale=1.0", "use_resolution_binning=False"), shifts=False,
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


def write_stock(plan: Export, folder: Path) -> str:
    """Fills the folder with the pipeline, and gives the Python lines that load and call it. ValueError where a stock pipeline would differ."""
    check_grid(plan)
    net = plan.student.flow_map.net
    family = FAMILIES[type(net.model).__name__]
    vae = _vae(plan, family)
    parts = {"transformer": folded(plan), "scheduler": family.build_scheduler(net.clock.unit), "vae": vae, **dict.fromkeys(family.empty)}
    pipe = getattr(diffusers, family.pipeline)(**parts)
    pipe.save_config(folder)  # model_index.json; the empty parts have nothing to save
    for name in ("transformer", "scheduler", *(["vae"] if vae is not None else [])):
        parts[name].save_pretrained(folder / name)
    return _snippet(plan, family, pipe)


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
        raise ValueError(f"--steps: gamma = {plan.gamma:g} puts noise back between steps, which no stock scheduler does; take --custom or --steps 1")


@torch.no_grad()
def folded(plan: Export) -> nn.Module:
    """The stock network that says at each step of the plan what the student's says, on the CPU."""
    net = plan.student.flow_map.net
    model = type(net.model).from_config(net.model.config)
    load_weights(model, net.model.state_dict())
    extra = constant_extra(plan)
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS]
    for module in found if extra is not None else []:
        if getattr(module, "post_act", None) is not None or module.linear_2.bias is None:
            raise ValueError(f"--to: a time embedding of {type(model).__name__} does not end in a bias; take --custom")
        module.linear_2.bias += extra.to(module.linear_2.bias)
    return model.eval().cpu()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """ValueError where the weights are not those of the plain network: adapters (LoRA) that are not merged, say."""
    try:
        model.load_state_dict({key: value.cpu() for key, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"--student: its weights are not those of a plain {type(model).__name__}; merge its adapters first") from error


def constant_extra(plan: Export) -> Tensor | None:
    """What the branches add to the time embeddings at every step of the plan, (width,); None without branches."""
    net = plan.student.flow_map.net
    t = torch.ones(1, device=plan.student.device)
    cond = {} if plan.guidance is None else {"guidance": plan.guidance * t}
    extra = branches(net.arrival, net.guidance, t, t - 1 / plan.steps, cond)
    return None if extra is None else extra[0]


def _vae(plan: Export, family: Family):
    """The student's autoencoder, its configuration saying how latents are scaled, or None."""
    frozen = plan.autoencoder()
    if frozen is None:
        return None
    shift, scale = scalar("shift", frozen.shift), scalar("scale", frozen.scale)
    if shift and not family.shifts:
        raise ValueError(f"autoencoder: {family.pipeline} knows no shift of latents, and this one has {shift:g}; take --custom")
    return scaled_vae(frozen.model, shift, scale)


def scaled_vae(model: nn.Module, shift: float, scale: float) -> nn.Module:
    """A copy of the autoencoder on the CPU whose configuration carries scaling_factor, and shift_factor where its class has one."""
    vae = copy.deepcopy(model).cpu()
    known = {"scaling_factor": scale, "shift_factor": shift}
    vae.register_to_config(**{key: value for key, value in known.items() if key in vae.config or value})
    return vae


def scalar(name: str, value) -> float:
    values = torch.as_tensor(value, dtype=torch.float64).flatten()
    if not bool((values == values[0]).all()):
        raise ValueError(f"autoencoder: its {name} differs by channel, which no diffusers configuration says")
    return float(values[0])


def _snippet(plan: Export, family: Family, pipe) -> str:
    net, shape = plan.student.flow_map.net, plan.student.config.shape
    call = list(family.call)
    if net.model.config.get("guidance_embeds") and plan.guidance is not None and family.pipeline == "FluxPipeline":
        call = [f"guidance_scale={plan.guidance:g}"]
    size = [f"{key}={side * pipe.vae_scale_factor}" for key, side in zip(("height", "width"), shape[1:], strict=True)]
    given = [f"{key}={key}" for key in family.conditions]
    kind = "" if pipe.vae is not None else ', output_type="latent"'
    empty = ", ".join(f'"{name}"' for name in (*family.empty, *(["vae"] if pipe.vae is None else [])))
    lines = ["from diffusers import DiffusionPipeline", "", f"not_here = dict.fromkeys([{empty}])"]
    lines += ['pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", **not_here)', "images = pipe("]
    lines += [f"    {', '.join(given)},", f"    num_inference_steps={plan.steps}, {', '.join([*call, *size])}{kind},", ").images"]
    return "\n".join(lines)
