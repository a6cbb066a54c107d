"""Infers the settings of a published EDM or EDM2 network from its class names and its weights' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from flowmap.nets.edm import ADM, DDPMpp
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.teachers.pickled import Record, tensors_of

NOT_NEEDED = ("logvar_", "model.map_augment.")
"""Prefixes of weights that sampling does not use: EDM2's loss weighting and EDM's augmentation labels."""


def tensors_of_net(net: Record, file: str) -> dict[str, Tensor]:
    """The network's weights by their published names, in float32. One-line ValueError for an unknown network."""
    found = {name: tensor.float() for name, tensor in tensors_of(net).items() if not name.startswith(NOT_NEEDED)}
    if any(name.startswith("unet.enc.") for name in found):
        return found
    if not any(name.startswith("model.enc.") for name in found):
        raise ValueError(f"{file}: its network ({net.name or 'unnamed'}) is not a U-Net of EDM's or EDM2's")
    if net.name != "EDMPrecond":
        name = net.name or "an unnamed class"
        raise ValueError(f"{file}: its network is preconditioned by {name}; of EDM's networks only EDMPrecond is read")
    if (kind := _inner(net)) not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise ValueError(f"{file}: its network is of class {kind or 'unknown'}; of EDM's networks {known} are read")
    return found


def config_of(net: Record, weights: dict[str, Tensor], file: str) -> StudentConfig:
    """The settings of a student with these weights. One-line ValueError if they fit no known network."""
    prefix = "unet" if any(name.startswith("unet.") for name in weights) else "model"
    family = _edm2 if prefix == "unet" else FAMILIES[_inner(net)]
    layers = {name.removeprefix(f"{prefix}."): tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        found = {int(match[1]) for name in layers if (match := re.match(r"enc\.(\d+)x\1_block0\.", name))}
        sides = sorted(found, reverse=True)
        size = sides[0]
        spec, channels, labels = family(layers, sides, float(net.state.get("sigma_data", 0.5)))
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{file}: the layers of its network are not those of EDM's or EDM2's U-Nets: {error}"
        ) from error
    return StudentConfig(
        net=spec,
        sampler=Deterministic(),
        shape=(channels, size, size),
        num_classes=labels[1] if labels else None,
        arrival=False,
        samples=Pixels(clamp=channels in (1, 3)),
        recipe="imported",
    )


Shapes = dict[str, tuple[int, ...]]


def _edm2(layers: Shapes, sides: list[int], sigma_data: float) -> tuple[EDM2, int, tuple[int, ...] | None]:
    """(spec, image channels, shape of the label weights or None)."""
    width = layers[f"enc.{sides[0]}x{sides[0]}_conv.weight"][0]
    levels = _levels(layers, sides, width, "conv_res0.weight", "attn_qkv.weight")
    spec = EDM2(channels=width, sigma_data=sigma_data, **levels)
    return spec, layers["out_conv.weight"][0], layers.get("emb_label.weight")


def _ddpmpp(layers: Shapes, sides: list[int], sigma_data: float) -> tuple[DDPMpp, int, tuple[int, ...] | None]:
    width, channels = layers[f"enc.{sides[0]}x{sides[0]}_conv.weight"][:2]
    levels = _levels(layers, sides, width, "conv0.weight", "qkv.weight")
    spec = DDPMpp(channels=width, ncsnpp="map_noise.freqs" in layers, sigma_data=sigma_data, **levels)
    return spec, channels, layers.get("map_label.weight")


def _adm(layers: Shapes, sides: list[int], sigma_data: float) -> tuple[ADM, int, tuple[int, ...] | None]:
    width, channels = layers["map_layer0.weight"][1], layers[f"enc.{sides[0]}x{sides[0]}_conv.weight"][1]
    levels = _levels(layers, sides, width, "conv0.weight", "qkv.weight")
    return ADM(channels=width, sigma_data=sigma_data, **levels), channels, layers.get("map_label.weight")


FAMILIES: dict[str, Callable] = {"SongUNet": _ddpmpp, "DhariwalUNet": _adm}


def _inner(net: Record) -> str:
    """The class name of the network inside a preconditioner."""
    model = net.state.get("_modules", {}).get("model")
    return model.name if isinstance(model, Record) else ""


def _levels(layers: Shapes, sides: list[int], width: int, conv: str, attention: str) -> dict:
    """The encoder's multipliers (in units of `width` channels), num_blocks and attention_at."""
    block = lambda side, i: f"enc.{side}x{side}_block{i}."
    first_level = f"enc.{sides[0]}x{sides[0]}_block"
    num_blocks = sum(name.startswith(first_level) and name.endswith(f".{conv}") for name in layers)
    return {
        "multipliers": tuple(layers[block(side, 0) + conv][0] // width for side in sides),
        "num_blocks": num_blocks,
        "attention_at": tuple(side for side in sides if block(side, 0) + attention in layers),
    }
