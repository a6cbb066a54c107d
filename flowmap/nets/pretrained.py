"""Loads the network of a diffusers pipeline, from a folder or hub id, by safetensors only and without custom code."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowmap.nets.diffusers_calls import CALLS
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet, check_scheduler, first_line, made
from flowmap.nets.precision import rounded_parameters
from flowmap.nets.teacher_settings import check_pipeline_settings
from flowmap.nets.unfilled import without_weights
from flowmap.nets.weight_files import check_weight_files, stored_in_bfloat16

NETWORK = ("transformer", "unet")
# the class of DiT and PixArt in pipelines of before diffusers split it, and what it is by its norm_type
FORMERLY = "Transformer2DModel"
NOW = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def load_pretrained(
    source: str, revision: str | None = None, *, as_stored: bool = False
) -> tuple[DiffusersModel, DiffusersNet]:
    """The settings and the network, without our branches, of a pipeline's folder or hub id at that revision.

    Only the network and the scheduler are read, and no code in the folder is run. Weights are float32. as_stored:
    those of layers are bfloat16 where all of the files are (precision.py holds them so). With accelerate, weights that
    are not converted stay in the memory-mapped files, which the processes of a machine share. Raises a one-line
    ValueError if the source does not exist, has no network or scheduler, or has an unknown schedule.
    """
    import diffusers

    spec = read_spec(source, revision)  # finds most errors before reading the weights
    where, _ = _component(source, revision, NETWORK)
    half = as_stored and stored_in_bfloat16(_weights_in(source, revision, where))
    try:
        model = getattr(diffusers, spec.network).from_pretrained(
            source,
            subfolder=where,
            revision=revision,
            torch_dtype=torch.bfloat16 if half else torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=find_spec("accelerate") is not None,
        )
    except Exception as error:  # diffusers raises various types for invalid folders
        raise ValueError(f"{_at(source, revision)}: {where} cannot be loaded: {first_line(error)}") from error
    if half:
        _widen(model, spec)
    net = DiffusersNet(model, *spec.clock(), arrival=False, guidance=False)
    return replace(spec, settings=_json(model.config)), net


def _widen(model: nn.Module, spec: DiffusersModel) -> None:
    """Make float32 of all but the weights of layers, and take constants that no file has from a network in float32."""
    layers = set(rounded_parameters(model))
    for p in model.parameters():
        p.data = p.data if p in layers else p.data.float()
    with without_weights():
        constants = dict(made(spec.network, spec.settings).named_buffers())
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float() if name in stored else constants[name]


def read_spec(source: str, revision: str | None = None) -> DiffusersModel:
    """The settings of a pipeline's network, without reading its weights. Raises as `load_pretrained` does."""
    import diffusers

    place = _at(source, revision)
    part, network = _component(source, revision, NETWORK)
    if network == FORMERLY:
        try:
            config = diffusers.Transformer2DModel.load_config(source, subfolder=part, revision=revision)
        except Exception as error:  # diffusers raises various types for invalid folders
            raise ValueError(f"{place}: cannot be loaded: {first_line(error)}") from error
        network = NOW.get(config.get("norm_type"), network)
    scheduler_folder, scheduler = _component(source, revision, ("scheduler",))
    _check_weights(source, part)
    if network not in CALLS:
        raise ValueError(f"{place}: no call is known for {network}; known: {', '.join(CALLS)}")
    try:
        check_scheduler(scheduler)
        settings = getattr(diffusers, network).load_config(source, subfolder=part, revision=revision)
        schedule = getattr(diffusers, scheduler).load_config(source, subfolder=scheduler_folder, revision=revision)
        check_scheduler(schedule.get("_class_name", scheduler))
        spec = DiffusersModel(network, _json(settings), scheduler, _json(schedule))
        spec = replace(spec, scheduler_settings=_json(made(scheduler, spec.scheduler_settings).config))
        check_pipeline_settings(_index(source, revision))
        spec.check_teacher()
        return spec
    except Exception as error:  # diffusers raises various types for invalid folders
        raise ValueError(f"{place}: cannot be read: {first_line(error)}") from error


def in_hub_cache(source: str, files: Sequence[str], revision: str | None = None) -> bool:
    """Whether any of those files of a hub id is in the local cache; False if `source` is not a hub id."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(source, name, revision=revision), str) for name in files)
    except ValueError:  # not a hub id
        return False


def _weights_in(source: str, revision: str | None, part: str) -> Path:
    """The local folder of a pipeline's part; of a hub id that in the cache, which may not exist."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(source):
        return Path(source) / part
    found = try_to_load_from_cache(source, f"{part}/config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else Path(source) / part


def is_hub_id(source: str) -> bool:
    """Whether it has the form owner/name, and is neither an absolute path nor one that starts with a dot."""
    return source.count("/") == 1 and not source.startswith((".", "/"))


def _check_weights(source: str, part: str) -> None:
    """Raise a ValueError if that part of a local folder has no complete safetensors files."""
    if (Path(source) / part).is_dir():
        try:
            check_weight_files(Path(source) / part)
        except ValueError as error:
            raise ValueError(f"{source}: {part} cannot be loaded: {error}") from error


def _at(source: str, revision: str | None) -> str:
    return f"{source} at revision {revision}" if revision else source


def _component(source: str, revision: str | None, names: tuple[str, ...]) -> tuple[str, str]:
    """(folder, class name) of the first of these components that the pipeline's model_index.json names."""
    index = _index(source, revision)
    for name in names:
        part = index.get(name)
        if isinstance(part, (list, tuple)) and len(part) == 2 and isinstance(part[1], str):
            if part[0] != "diffusers":
                what = f"{part[1]} of {part[0]!r} is no class of diffusers; its own code is not run"
                raise ValueError(f"{_at(source, revision)}: {name}: {what}")
            return name, part[1]
    raise ValueError(f"{source}: its model_index.json names no {' or '.join(names)}")


def _index(source: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's model_index.json."""
    from diffusers import DiffusionPipeline

    here = os.path.isdir(source)
    if not here and not is_hub_id(source):
        raise ValueError(f"{source}: no diffusers pipeline is there: no such folder, and no hub id (owner/name)")
    try:
        index = DiffusionPipeline.load_config(source, revision=revision, local_files_only=here)
    except (OSError, ValueError) as error:
        what = f"no diffusers pipeline is there (model_index.json): {first_line(error)}"
        raise ValueError(f"{_at(source, revision)}: {what}") from error
    return index if isinstance(index, dict) else {}


def _json(config) -> str:
    """A diffusers configuration as JSON, without private keys, such as the path that it was loaded from."""
    return json.dumps({key: value for key, value in dict(config).items() if not key.startswith("_")}, sort_keys=True)
