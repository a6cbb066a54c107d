"""Frozen networks of known sizes that an estimate does not build: those of metrics, and text encoders.

Their FLOPs, weights and activations were counted on the meta device from the classes of transformers and torchvision
in the published sizes. They run in float32, except for text encoders of captions in a run in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from flowmap.data import Encoded
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.stacked import net_within
from flowmap.recipe import Recipe
from flowmap.student.config import StudentConfig
from flowmap.student.examples import tokens_of


class PictureNetwork(NamedTuple):
    """features: the width. weights, activations: bytes, the latter of a picture. flops: of a picture."""

    features: int
    weights: int
    activations: int
    flops: float


NETWORKS: Mapping[str, PictureNetwork] = {
    "inception": PictureNetwork(2048, 109_000_000, 17_000_000, 11.4e9),
    "efficientnet_lite0": PictureNetwork(1280, 19_000_000, 13_000_000, 0.77e9),
    "clip": PictureNetwork(768, 1_218_000_000, 62_000_000, 382e9),
    "dinov2": PictureNetwork(1024, 1_218_000_000, 17_000_000, 162e9),
}
# CLIP ViT-L/14 at 224 pixels with its text encoder, which reads a caption for each picture.
CLIP_SCORE = PictureNetwork(768, 1_711_000_000, 21_000_000, 175e9)

CLIP_TOKENS = 77
# Parameters of the text encoders of each network's pipeline: CLIP, which reads 77 tokens, and T5, Gemma or Qwen (the
# language model alone). FLUX.2's is that of klein 4B.
ENCODERS: Mapping[str, tuple[float, float]] = {
    "UNet2DConditionModel": (0.12e9, 0),
    "SD3Transformer2DModel": (0.82e9, 4.76e9),
    "FluxTransformer2DModel": (0.12e9, 4.76e9),
    "SanaTransformer2DModel": (0, 2.6e9),
    "PixArtTransformer2DModel": (0, 4.76e9),
    "QwenImageTransformer2DModel": (0, 7.07e9),
    "ZImageTransformer2DModel": (0, 4.02e9),
    "Flux2Transformer2DModel": (0, 4.02e9),
    "HunyuanImageTransformer2DModel": (0, 7.07e9),
    "Lumina2Transformer2DModel": (0, 2.61e9),
    "AuraFlowTransformer2DModel": (0, 1.2e9),
}
SDXL_ENCODERS = (0.82e9, 0.0)


def picture_networks(recipe: Recipe) -> dict[str, tuple[PictureNetwork, int]]:
    """Each network that the metrics pass pictures through, with the largest number of generated ones."""
    found: dict[str, tuple[PictureNetwork, int]] = {}
    for spec in recipe.metrics:
        name = spec.picture_network
        net = CLIP_SCORE if name == "clip_score" else NETWORKS.get(name or "")
        if name is not None and net is not None:
            found[name] = (net, max(spec.images, found[name][1] if name in found else 0))
    return found


def live_text(recipe: Recipe) -> bool:
    """Whether captions are encoded while the run trains."""
    data = recipe.data
    return isinstance(data, Encoded) and data.text is not None and data.stored_text == "captions"


def encoders_of(config: StudentConfig) -> tuple[float, float]:
    """The parameters of the text encoders of the network's pipeline; 0 if it has none or they are not known."""
    net = net_within(config.net)
    if config.text is None or not isinstance(net, DiffusersModel):
        return (0, 0)
    if json.loads(net.settings).get("addition_embed_type") == "text_time":
        return SDXL_ENCODERS
    return ENCODERS.get(net.network, (0, 0))


def encoder_bytes(config: StudentConfig, precision: str = "32") -> float:
    """The bytes of their weights in that precision, "32" or "bf16"."""
    return (2 if precision == "bf16" else 4) * sum(encoders_of(config))


def live_text_bytes(recipe: Recipe, config: StudentConfig) -> float:
    """The bytes of the text encoders that stay on a device while the run trains; 0 if text is stored."""
    return encoder_bytes(config, recipe.trainer.frozen_precision) if live_text(recipe) else 0.0


def caption_flops(config: StudentConfig) -> float:
    """The FLOPs of encoding a caption: two for each parameter and token."""
    net, (clip, other) = net_within(config.net), encoders_of(config)
    if not isinstance(net, DiffusersModel):
        return 0.0
    tokens = tokens_of(net.network, config.text) - (CLIP_TOKENS if net.network == "SD3Transformer2DModel" else 0)
    return 2 * (clip * CLIP_TOKENS + other * tokens)
