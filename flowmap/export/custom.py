"""Exports a student as a diffusers pipeline with custom code, for networks and schedules without a stock pipeline.

The folder contains two generated Python files, pipeline.py and the network's, which need only torch and diffusers.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import diffusers

from flowmap.base.files import write_json, write_text
from flowmap.base.schema import kind_of
from flowmap.export.amalgamate import amalgamate
from flowmap.export.constants import load_weights
from flowmap.export.custom_model import FlowMapModel
from flowmap.export.custom_pipeline import TIME_UNIT
from flowmap.export.plan import Export, Written
from flowmap.export.text import PROMPT, TextParts, write_text_parts
from flowmap.export.vae import ENCODER_KEPT, exported_vae
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.stacked import Stacked, net_within, stack_of
from flowmap.recipe.kinds import TABLES
from flowmap.student.config_file import config_json

HEADER = "{what} Generated from the source of flowmap {version} (Apache License 2.0) by `flowmap export`: do not edit."

ARGUMENTS = {
    "UNet2DConditionModel": ("prompt_embeds",),
    "PixArtTransformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "SanaTransformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "QwenImageTransformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "ZImageTransformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "Flux2Transformer2DModel": ("prompt_embeds",),
    "HunyuanImageTransformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "Lumina2Transformer2DModel": ("prompt_embeds", "prompt_attention_mask"),
    "AuraFlowTransformer2DModel": ("prompt_embeds",),
    "SD3Transformer2DModel": ("prompt_embeds", "pooled_prompt_embeds"),
    "FluxTransformer2DModel": ("prompt_embeds", "pooled_prompt_embeds"),
}
"""Arguments of a pipeline call by network, for the card."""


def write_custom(plan: Export, folder: Path) -> Written:
    """Write pipeline, network, scheduler, autoencoder and text encoders to the folder.

    Returns the Python lines that load and call it.
    """
    config = plan.student.config
    module = f"flow_map_{kind_of(config.net, TABLES) or type(config.net).__name__.lower()}"
    net, stacked = net_within(config.net), isinstance(config.net, Stacked)
    network = staticmethod(stack_of(type(net))) if stacked else type(net)
    network_class = type("FlowMapModel", (FlowMapModel,), {"network": network, "__module__": FlowMapModel.__module__})
    settings = json.loads(json.dumps(asdict(net)))
    model = network_class(settings, list(config.shape), config.num_classes, config.arrival, config.guidance is not None)
    load_weights(model.flow_map, plan.student.flow_map.state_dict())
    model.save_pretrained(folder / "flow_map", safe_serialization=True)
    write_text(folder / "flow_map" / f"{module}.py", network_source(type(net), stacked=stacked))
    write_text(folder / "pipeline.py", pipeline_source())
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=TIME_UNIT, shift=1.0)
    scheduler.save_pretrained(folder / "scheduler")
    vae = exported_vae(plan)
    if vae is not None:
        vae.save_pretrained(folder / "vae", safe_serialization=True)
    text = write_text_parts(plan, folder)
    write_json(folder / "model_index.json", _index(plan, module, vae, text))
    return Written(_snippet(plan, vae is not None, text is not None), (ENCODER_KEPT,) if plan.unit else ())


def network_source(spec: type, *, stacked: bool = False) -> str:
    """The network's Python file: the class of its settings, the modules that it builds, and the diffusers model.

    stacked: the network is two of these in series.
    """
    roots = [("flowmap.export.custom_model", "FlowMapModel"), (spec.__module__, spec.__name__)]
    roots += [(stack_of.__module__, stack_of.__name__)] if stacked else []
    header = _header(f"A flow map's network ({spec.__name__}{', two in series' if stacked else ''}).")
    made = f"staticmethod(stack_of({spec.__name__}))" if stacked else spec.__name__
    return amalgamate(roots, header=header, tail=f"FlowMapModel.network = {made}")


def pipeline_source() -> str:
    """The Python file of the pipeline."""
    roots = [("flowmap.export.custom_pipeline", "FlowMapPipeline")]
    return amalgamate(roots, header=_header("A few-step pipeline for flow maps."))


def _header(what: str) -> str:
    from flowmap import __version__

    return HEADER.format(what=what, version=__version__)


def _index(plan: Export, module: str, vae, text: TextParts | None) -> dict:
    sampler = {key: value for key, value in asdict(plan.sampler).items() if key != "steps"}
    return {
        "_class_name": ["pipeline", "FlowMapPipeline"],
        "_diffusers_version": diffusers.__version__,
        "flow_map": [module, "FlowMapModel"],
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "vae": [None, None] if vae is None else ["diffusers", type(vae).__name__],
        **(text.index if text else {}),
        "text": {key: value for key, value in asdict(text).items() if key != "index"} if text else None,
        "sampler": sampler,
        "steps": plan.steps,
        "guidance_scale": plan.guidance,
        "clamp": plan.student.config.clamp,
        "id2label": config_json(plan.student.config).get("id2label"),
    }


def _snippet(plan: Export, decodes: bool, encodes: bool) -> str:
    config = plan.student.config
    labels = json.dumps(list(config.class_names[:2]), ensure_ascii=False) if config.class_names else "[0, 1]"
    arguments = [f"class_labels={labels}" if config.num_classes and config.num_classes > 1 else "num_images=2"]
    if encodes:
        arguments = [f'prompt="{PROMPT}"']
    elif isinstance(net := net_within(config.net), DiffusersModel) and net.network in ARGUMENTS:
        arguments = [f"{name}={name}" for name in ARGUMENTS[net.network]]
    arguments.append(f"num_inference_steps={plan.steps}")
    if plan.guidance is not None:
        arguments.append(f"guidance_scale={plan.guidance:g}")
    if not (decodes or (config.clamp and len(config.shape) == 3 and config.shape[0] in (1, 3))):
        arguments.append('output_type="latent"')
    lines = ["from diffusers import DiffusionPipeline", ""]
    lines += ['pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)']
    return "\n".join([*lines, f"images = pipe({', '.join(arguments)}).images"])
