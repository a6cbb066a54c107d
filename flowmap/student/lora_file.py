"""Read a LoRA in a safetensors file of diffusers, peft or another trainer as changes of weights: (alpha / rank) B A by
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import read_json, read_tensors

PREFIXES = ("base_model.model.", "unet.", "transformer.")
DOWN_OR_UP = re.compile(r"(.+?)(?:\.lora)?[._](lora_A|lora_B|lora_down|lora_up|down|up)(?:\.default)?\.(weight|bias)")
PROCESSOR = re.compile(r"(.+)\.processor\.(\w+)_lora")
ENDS = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B"}
UNDERSCORED = "lora_unet_"  # names of other trainers: every dot is an underscore


def read_lora(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The change of each weight by its name in the network. names: the network's weights, to resolve names with
    underscores.

    A layer's alpha is the file's own, by default that of its metadata or of adapter_config.json next to it, by default
    its rank. A weight that belongs to no layer of the network keeps its name. Raises ValueError for a file that is no
    LoRA, or one of another kind (DoRA, LoHa, ...).
    """
    layers: dict[str, dict[str, Tensor]] = {}
    whole = {
        name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight")
    }
    for key, tensor in read_tensors(path).items():
        layer, part = _place(key, whole, path)
        layers.setdefault(layer, {})[part] = tensor.float()
    default = _scaling(path)
    changes: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        if "A" not in parts or "B" not in parts:
            found = " and ".join(sorted(parts))
            raise ValueError(f"--lora: {path}: {layer} has {found} but not both of A and B: it is torn, or no LoRA")
        rank = len(parts["A"])
        ratio = float(parts["alpha"]) / rank if "alpha" in parts else default(layer, rank)
        changes[f"{layer}.weight"] = ratio * _product(parts["B"], parts["A"], f"{path}: {layer}")
        if "bias" in parts:
            changes[f"{layer}.bias"] = ratio * parts["bias"]
    return changes


def _place(key: str, whole: dict[str, str], path: Path) -> tuple[str, str]:
    """(layer, "A", "B", "bias" or "alpha") for a key of the file."""
    found = DOWN_OR_UP.fullmatch(key)
    if found is None and not key.endswith(".alpha"):
        raise ValueError(f"--lora: {path}: {key!r} is no weight of a LoRA in the format of diffusers or peft")
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
        raise ValueError(f"--lora: {what}: B {tuple(up.shape)} and A {tuple(down.shape)} make no product")
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def _scaling(path: Path) -> Any:
    """(layer, rank) -> alpha / rank, for layers without an alpha in the file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    settings = {key.rpartition(".")[2]: value for key, value in settings.items()}
    settings_file = path.with_name("adapter_config.json")
    if not settings and settings_file.is_file():
        settings = read_json(settings_file)
    for name in ("alpha_pattern", "use_dora", "use_rslora"):
        if settings.get(name):
            raise ValueError(f"--lora: {path}: {name} is set, which is not read")
    alpha = settings.get("lora_alpha")
    return lambda layer, rank: 1.0 if alpha is None else alpha / rank
