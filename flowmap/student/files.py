"""The files of a student, local or on the hub: config.json and model.safetensors, read and written without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowmap.base.files import copy_folder, read_tensors, write_json, write_tensors, write_text
from flowmap.base.hub import fetched, is_repository
from flowmap.base.trust import allow_import
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import TEACHER_LORA, load_base
from flowmap.nets.stacked import net_within
from flowmap.nets.unfilled import without_weights
from flowmap.recipe.kinds import student_part
from flowmap.student.config import SHIPPED_AUTOENCODER, StudentConfig
from flowmap.student.config_file import config_json, read_config
from flowmap.student.prior import PRIOR
from flowmap.student.quantized import check_quantize, quantize_student

FILES = ("config.json", "model.safetensors", "recipe.yaml", "README.md")
FOLDERS = (SHIPPED_AUTOENCODER, PRIOR, TEACHER_LORA)  # of models that the student needs, next to these files
MAX_SIZE = 1 << 28  # entries of a sample


def save_student(folder: Path, config: StudentConfig, weights: Mapping[str, Tensor], *, recipe: str, card: str) -> None:
    """Write the student folder, each file under a temporary name first, and the config after its weights."""
    write_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config_json(config))
    write_text(folder / "recipe.yaml", recipe)
    write_text(folder / "README.md", card)


def check_place(folder: Path, key: str) -> None:
    """Raise ValueError that names `key` unless the folder is missing, empty, or has a student and nothing else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in (*FILES, *FOLDERS))
    if others:
        raise ValueError(f"{key}: {folder} has {others[0]}, which is no part of a student; choose another folder")
    try:
        read_config(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{key}: {folder} is not empty and has no student, so it is not changed ({error})") from error


def copy_models(source: Path, target: Path) -> None:
    """Copy the models that are stored next to a student's weights (its autoencoder, its prior) to another student
    folder.
    """
    for part in FOLDERS:
        copy_folder(source / part, target / part)


def read_student(
    source: str | Path,
    *,
    base: str | Path | None,
    imports: str | Sequence[str],
    revision: str | None,
    quantize: str | None,
) -> tuple[StudentConfig, FlowMapNet, Path]:
    """The configuration, flow map and local folder of a student; the arguments and errors are those of load_student."""
    check_quantize(quantize)
    for name in [imports] if isinstance(imports, str) else imports:
        allow_import(name)
    folder = _local(source, revision)
    config = read_config(folder / "config.json")
    if base is not None:
        if config.base is None:
            raise ValueError(f"base: {str(base)!r} was given, but this student has its weights with it")
        config = replace(config, base=replace(config.base, source=str(base), revision=None))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        what = f"; {pickles[0]} is a pickle and is not read" if pickles else ""
        raise ValueError(f"{weights}: there is no such file{what}")
    flow_map = _flow_map(config, folder, read_tensors(weights))
    if quantize is not None:
        quantize_student(flow_map, quantize, adapted=config.lora is not None)
    return config, flow_map.eval().requires_grad_(False), folder


def _flow_map(config: StudentConfig, folder: Path, state: Mapping[str, Tensor]) -> FlowMapNet:
    """The network of that configuration with these weights."""
    flow_map = _empty(config, state, folder / "config.json")
    _check_shapes(flow_map.state_dict(), state, folder / "model.safetensors")
    if config.lora is not None:
        assert config.base is not None and isinstance(config.net, DiffusersModel)  # StudentConfig has checked
        try:
            flow_map = config.build(load_base(config.base, config.net, folder))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: base: {error}") from error
    elif student_part(config.net).holds_constants:
        with without_weights():
            flow_map = config.build()
    flow_map.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return flow_map


def _local(source: str | Path, revision: str | None) -> Path:
    folder = Path(source)
    if (folder / "student").is_dir():
        folder = folder / "student"
    if folder.exists():
        if revision is not None:
            raise ValueError(f"revision: {revision!r} was given, but {str(source)!r} is a local path")
        if folder.is_dir():
            return folder
        raise ValueError(f"student: {str(source)!r} is a file; give the folder with config.json and model.safetensors")
    if isinstance(source, str) and is_repository(source) and not source.startswith("runs/"):
        return fetched(source, [*FILES, *(f"{part}/*" for part in FOLDERS)], key="student", revision=revision)
    raise ValueError(
        f"student: {str(source)!r} is no folder with config.json and model.safetensors, and no hub id (owner/name)"
    )


def _empty(config: StudentConfig, state: Mapping[str, Tensor], file: Path) -> FlowMapNet:
    """The network on the meta device. A size that no tensor of `state` has is refused first."""
    largest = max([len(state), *(size for tensor in state.values() for size in tensor.shape)])
    rank = None if config.lora is None else config.lora.rank
    for name, value in [
        *vars(net_within(config.net)).items(),
        ("num_classes", config.num_classes),
        ("lora.rank", rank),
    ]:
        if isinstance(value, int) and not -1 < value <= largest:
            raise ValueError(f"{file}: {name}: {value} does not fit model.safetensors, whose largest size is {largest}")
    if math.prod(config.shape) > MAX_SIZE:
        raise ValueError(f"{file}: shape: {config.shape} has more than {MAX_SIZE} entries")
    try:
        with torch.device("meta"):
            return config.build()
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: net: {str(error).splitlines()[0]}") from error


def _check_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in expected.items():
        if name not in got:
            raise ValueError(
                f"{file}: {name}: is missing; the weights are of another architecture than config.json says"
            )
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: {name}: has shape {tuple(got[name].shape)}, config.json says {tuple(tensor.shape)}"
            )
        if not got[name].is_floating_point():
            raise ValueError(
                f"{file}: {name}: has {str(got[name].dtype).removeprefix('torch.')}, not floating-point weights"
            )
    for name in got:
        if name not in expected:
            raise ValueError(f"{file}: {name}: is not part of the network that config.json describes")
