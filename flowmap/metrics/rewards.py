"""Rewards of pictures x (B, C, H, W) in [-1, 1], one number a sample: REWARDS, the kinds that a recipe may name.

Each carries a gradient to x. A reward of your own is a function of (x, cond); a recipe names it by `function`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.files import read_tensors, write_tensors
from flowmap.base.ranges import CountFromZero, check_ranges
from flowmap.base.trust import allowed_attribute
from flowmap.flow.types import Cond
from flowmap.metrics.picture_nets import in_colour, load_network, transformers_source


@dataclass(frozen=True)
class Ink:
    """The mean brightness of a picture, in [0, 1]."""

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return (x.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


@dataclass(frozen=True)
class Symmetry:
    """Minus the mean squared difference of a picture and its mirror image, left to right; at most 0."""

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return -(x - x.flip(-1)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Classifier:
    """log p(label | x) of a classifier of clean samples.

    weights     a safetensors file of layers, as `write_classifier` writes it
    label       the class; without one, the class that the sample is drawn for
    """

    weights: str
    label: CountFromZero | None = None

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        net = _classifier(self.weights, _changed(self.weights), x.device)
        if x[0].numel() != net[0].in_features:
            what = f"reads {net[0].in_features} numbers, and a sample has {x[0].numel()}"
            raise ValueError(f"reward.weights: {self.weights}: {what}")
        return _log_prob(net(x.flatten(1).float()), self.label, cond)


@dataclass(frozen=True)
class Function:
    """A function of yours, r(x, cond) -> (B,). function: `module:attribute`, whose module the command line allows by
    --import.
    """

    function: str

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        found = allowed_attribute(self.function, "reward.function")
        return found(x, cond)


@dataclass(frozen=True)
class CLIP:
    """The cosine of CLIP's embeddings of a picture and of `prompt`, in [-1, 1].

    model: a CLIP of transformers, as a folder or a hub id in the cache, safetensors; nothing is downloaded.
    """

    prompt: str
    model: str = "openai/clip-vit-large-patch14"

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        net = _clip(self.model, x.device)
        return F.cosine_similarity(net.pictures(x), net.text(self.prompt))


REWARDS: dict[str, Any] = {
    "ink": Ink,
    "symmetry": Symmetry,
    "classifier": Classifier,
    "function": Function,
    "clip": CLIP,
}


def write_classifier(path: Path, layers: list[nn.Linear]) -> None:
    """Write the layers of a classifier of flattened samples, with SiLU between them, as {"0.weight": ...}."""
    named = {f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.state_dict().items()}
    write_tensors(path, named)


def _log_prob(logits: Tensor, label: int | None, cond: Cond | None) -> Tensor:
    if label is None and "class" not in (cond or {}):
        raise ValueError("reward.label: is required: the samples are drawn for no class")
    labels = torch.full_like(logits[:, 0], label, dtype=torch.int64) if label is not None else (cond or {})["class"]
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"reward.label: {int(labels[0])} is not one of 0..{logits.shape[1] - 1}")
    return F.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)


def _changed(path: str) -> float:
    """When the file was written, so that a new one is read."""
    return Path(path).stat().st_mtime if Path(path).is_file() else 0.0


@lru_cache(maxsize=4)
def _classifier(path: str, changed: float, device: torch.device) -> nn.Sequential:
    state = read_tensors(Path(path))
    layers: list[nn.Module] = []
    for i in range(len(state) // 2):
        weight, bias = state.get(f"{i}.weight"), state.get(f"{i}.bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"reward.weights: {path}: is no classifier: 0.weight, 0.bias, 1.weight, ...")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [nn.SiLU(), layer] if layers else [layer]
    if not layers:
        raise ValueError(f"reward.weights: {path}: is no classifier: it has no layers")
    return nn.Sequential(*layers).requires_grad_(False).to(device)


class _Towers(nn.Module):
    """CLIP of transformers with a preprocessing that carries a gradient."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: str):
        super().__init__()
        from transformers import CLIPModel, CLIPProcessor

        self.model = load_network(CLIPModel, source, "reward clip", "CLIP").eval().requires_grad_(False)
        processor = load_network(CLIPProcessor, source, "reward clip", "tokenizer and preprocessing of CLIP")
        self.tokenizer = processor.tokenizer
        for name, value in (
            ("mean", processor.image_processor.image_mean),
            ("std", processor.image_processor.image_std),
        ):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1))
        self.known: dict[str, Tensor] = {}

    def pictures(self, x: Tensor) -> Tensor:
        side = self.model.config.vision_config.image_size
        x = F.interpolate(in_colour(x).float().clamp(-1, 1), (side, side), mode="bicubic", antialias=True)
        values = ((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        return self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        if prompt not in self.known:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(
                self.mean.device
            )
            found = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            self.known[prompt] = self.model.text_projection(found.pooler_output)
        return self.known[prompt]


@lru_cache(maxsize=2)
def _clip(model: str, device: torch.device) -> _Towers:
    return _Towers(transformers_source("reward clip", model)).to(device)
