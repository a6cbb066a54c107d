"""One tiny student of every family of networks that large recipes train, with conditions for a batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from flowmap.nets import ADM, DDPMpp, DiT
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.edm2 import EDM2
from flowmap.nets.flow_map import FlowMapNet
from tests.support import tiny_nets
from tests.support.tiny_nets import POOLED, TEXT

SHAPE = (4, 8, 8)


@dataclass(frozen=True)
class Family:
    """build() is a network with branches; blocks: how many it has; text: its conditions are those of a text."""

    build: Callable[[], nn.Module]
    blocks: int
    text: bool = False
    sized: bool = False  # it reads SDXL's sizes and crop

    def student(self, seed: int = 0) -> FlowMapNet:
        """The family's flow map with random weights everywhere: zeros would hide the layers behind them."""
        torch.manual_seed(seed)
        return FlowMapNet(tiny_nets.with_random_weights(self.build(), 0.1))

    def conditions(self, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        draw = lambda *shape: torch.randn(
            rows, *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype
        )
        rest = {"text": draw(5, TEXT), "pooled": draw(POOLED)} if self.text else {"class": torch.arange(rows) % 7}
        rest |= {"size": torch.tensor([[16.0, 16, 0, 0, 16, 16]], dtype=dtype).expand(rows, 6)} if self.sized else {}
        return {"guidance": torch.linspace(1, 3, rows, dtype=dtype), **rest}


@dataclass(frozen=True)
class Built:
    """A function that builds a network for samples of that shape: its settings, and the options of their build.

    more: those that a student's network has from its data or prior.
    """

    settings: Callable[[], Any]
    shape: tuple[int, ...]
    options: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        return self.settings().build(self.shape, **self.options, **self.more)


def pretrained(make: Callable[[], nn.Module], scheduler: str, shape: tuple[int, ...] = SHAPE) -> Built:
    """A function that builds a student's network for samples of that shape, with the settings of make()'s."""

    def settings_of() -> DiffusersModel:
        model = make()
        settings = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
        schedule = {} if "Flow" in scheduler else {"beta_schedule": "scaled_linear", "clip_sample": False}
        return DiffusersModel(type(model).__name__, json.dumps(settings), scheduler, json.dumps(schedule))

    return Built(settings_of, shape, {"guidance": True})


FLOW, NOISE = "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"
assert {FLOW, NOISE} <= set(dir(diffusers))
OURS: dict[str, Any] = {"num_classes": 7, "guidance": True}
TWO_LEVELS: dict[str, Any] = {"multipliers": (1, 2), "num_blocks": 1, "attention_at": ()}
FAMILIES = {
    "dit": Family(lambda: DiT(preset="nano", depth=3).build(SHAPE, **OURS), 3),
    # two levels: per level a convolution or a halving, then a block; in the decoder two, then a doubling and two
    "edm2": Family(lambda: EDM2(channels=16, **TWO_LEVELS).build(SHAPE, **OURS), 10),
    "ddpmpp": Family(lambda: DDPMpp(channels=32, **TWO_LEVELS).build(SHAPE, **OURS), 10),
    "adm": Family(lambda: ADM(channels=64, **TWO_LEVELS).build(SHAPE, **OURS), 10),
    # residual blocks and attentions: 3 down, 3 in the middle, 6 up; one halving and one doubling
    "sd15": Family(pretrained(tiny_nets.sd, NOISE), 14, text=True),
    "sd35": Family(pretrained(tiny_nets.sd3, FLOW), 2, text=True),
    "sana": Family(pretrained(tiny_nets.sana, FLOW), 1, text=True),
    "flux": Family(pretrained(tiny_nets.flux, FLOW), 2, text=True),
    "sdxl": Family(pretrained(tiny_nets.sdxl, NOISE), 14, text=True, sized=True),
    "qwen": Family(pretrained(tiny_nets.qwen, FLOW), 1, text=True),
    "aura_flow": Family(pretrained(tiny_nets.aura_flow, FLOW), 2, text=True),
    "pixart": Family(pretrained(tiny_nets.pixart, NOISE), 2, text=True),
    # its first block's embedding is a unit too: the model calls it once more after the last block
    "dit_xl": Family(pretrained(tiny_nets.dit, NOISE), 3),
}
