"""Read a LoRA in a safetensors file of diffusers, peft or another trainer, and add it to a network's weights:
W + scale (alpha / rank) B A.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.base.files import read_json, read_tensors, write_beside
from flowmap.base.hub import fetched, is_repository

PREFIXES = ("base_model.model.", "unet.", "transformer.")
DOWN_OR_UP = re.compile(r"(.+?)(?:\.lora)?[._](lora_A|lora_B|lora_down|lora_up|down|up)(?:\.default)?\.(weight|bias)")
PROCESSOR = re.compile(r"(.+)\.processor\.(\w+)_lora")
ENDS = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B"}
UNDERSCORED = "lora_unet_"  # names of other trainers: every dot is an underscore
SHIPPED = ("adapter_model.safetensors", "adapter_config.json")  # next to a student's weights
FILES = ("pytorch_lora_weights.safetensors", *SHIPPED)  # of a hub id


@dataclass(frozen=True)
class Adapter:
    """The matrices of one layer, and alpha / rank. down: (rank, in, ...). up: (out, rank, ...). bias: (out,) or None,
    added with the same factor.
    """

    down: Tensor
    up: Tensor
    ratio: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def lora_path(source: str, key: str) -> Path:
    """The file of a LoRA: a safetensors file, a folder that has one, or a hub id (owner/name).

    Raises a one-line ValueError that names `key` if there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if not is_repository(source):
            raise ValueError(f"{key}: {source!r}: there is no such file or folder, and it is no hub id (owner/name)")
        path = fetched(source, FILES, key=key)
    found = sorted(path.glob("*.safetensors"))
    named = [one for one in found if one.name in FILES]
    if len(named or found) != 1:
        what = "has no LoRA" if not found else f"has {len(found)} safetensors files; name one of them"
        raise ValueError(f"{key}: {source}: {what} ({', '.join(FILES[:2])})")
    return (named or found)[0]


def check_lora(source: str, key: str) -> str | None:
    """Return why the LoRA is not on this machine yet, in one line; None if it is. Raises ValueError as lora_path does
    for what is neither here nor a hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists() or not is_repository(source):
        lora_path(source, key)
        return None
    here = any(isinstance(try_to_load_from_cache(source, name), str) for name in FILES)
    return None if here else f"{key}: {source!r}: not on this machine; fit fetches it"


def copy_lora(source: str, folder: Path) -> None:
    """Copy the LoRA, and the configuration next to it, to the folder under peft's names."""
    path = lora_path(source, "teacher.lora")
    for one, name in zip((path, path.with_name(SHIPPED[1])), SHIPPED, strict=True):
        if one.is_file():
            write_beside(folder / name, partial(shutil.copyfile, one))


def add_file(model: nn.Module, path: Path, scale: float, key: str) -> None:
    """Add scale times the LoRA to the model's weights, in float32. Raises a one-line ValueError that names `key` if a
    layer of the file is not in the model, or has another shape there.
    """
    weights = dict(model.named_parameters())
    for name, change in read_lora(path, weights, key).items():
        if name not in weights:
            if name.endswith(".bias") and not change.any():
                continue  # an adapter has biases on all layers or none: those without one have zeros
            layer = name.rpartition(".")[0]
            raise ValueError(f"{key}: {path}: {layer}: fits no layer of {type(model).__name__}")
        p = weights[name]
        if p.shape != change.shape:
            shapes = f"makes {tuple(change.shape)}, the weight there is {tuple(p.shape)}"
            raise ValueError(f"{key}: {path}: {name}: {shapes}")
        p.data = (p.data.float() + scale * change.to(p.device)).to(p.dtype)


def read_lora(path: Path, names: Iterable[str], key: str = "--lora") -> dict[str, Tensor]:
    """The change of each weight by its name in the network. names and errors: those of read_adapters."""
    changes: dict[str, Tensor] = {}
    for layer, adapter in read_adapters(path, names, key).items():
        changes[f"{layer}.weight"] = adapter.ratio * _product(adapter.up, adapter.down, f"{key}: {path}: {layer}")
        if adapter.bias is not None:
            changes[f"{layer}.bias"] = adapter.ratio * adapter.bias
    return changes


def read_adapters(path: Path, names: Iterable[str], key: str = "--lora") -> dict[str, Adapter]:
    """The adapter of each layer by its name in the network. names: the network's weights, to resolve names with
    underscores.

    A layer's alpha is the file's own, by default that of its metadata or of adapter_config.json next to it, by default
    its rank. A layer that the network does not have keeps its name. Raises a one-line ValueError that names `key` for a
    file that is no LoRA, or one of another kind (DoRA, LoHa, ...).
    """
    layers: dict[str, dict[str, Tensor]] = {}
    whole = {
        name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight")
    }
    for name, tensor in read_tensors(path).items():
        layer, part = _place(name, whole, f"{key}: {path}")
        layers.setdefault(layer, {})[part] = tensor.float()
    default = _scaling(path, key)
    return {layer: _adapter(parts, default, f"{key}: {path}: {layer}") for layer, parts in layers.items()}


def _adapter(parts: Mapping[str, Tensor], default: float | None, what: str) -> Adapter:
    if "A" not in parts or "B" not in parts:
        raise ValueError(f"{what} has {' and '.join(sorted(parts))} but not both of A and B: it is torn, or no LoRA")
    rank = len(parts["A"])
    ratio = float(parts["alpha"]) / rank if "alpha" in parts else 1.0 if default is None else default / rank
    return Adapter(parts["A"], parts["B"], ratio, parts.get("bias"))


def _place(key: str, whole: dict[str, str], what: str) -> tuple[str, str]:
    """(layer, "A", "B", "bias" or "alpha") for a key of the file."""
    found = DOWN_OR_UP.fullmatch(key)
    if found is None and not key.endswith(".alpha"):
        raise ValueError(f"{what}: {key!r} is no weight of a LoRA in the format of diffusers or peft")
    layer = found[1] if found else key.removesuffix(".alpha").removesuffix(".lora")
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    old = PROCESSOR.fullmatch(layer)
    if old is not None:
        layer = f"{old[1]}.{'to_out.0' if old[2] == 'to_out' else old[2]}"
    if layer.startswith(UNDERSCORED):
        layer = whole.get(layer.removeprefix(UNDERSCORED), layer)
    return layer, "alpha" if found is None else "bias" if found[3] == "bias" else ENDS[found[2]]


def _product(up: Tensor, down: Tensor, what: str) -> Tensor:
    """B A in the shape of the layer's weight: (out, in), or (out, in, k, k) for a convolution."""
    if up.shape[1] != len(down) or up[0, 0].numel() != 1:
        raise ValueError(f"{what}: B {tuple(up.shape)} and A {tuple(down.shape)} make no product")
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def _scaling(path: Path, key: str) -> float | None:
    """The alpha of layers without one in the file; None for their rank."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        settings: dict[str, Any] = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    settings = {name.rpartition(".")[2]: value for name, value in settings.items()}
    settings_file = path.with_name("adapter_config.json")
    if not settings and settings_file.is_file():
        settings = read_json(settings_file)
    for name in ("alpha_pattern", "use_dora", "use_rslora"):
        if settings.get(name):
            raise ValueError(f"{key}: {path}: {name} is set, which is not read")
    return settings.get("lora_alpha")
