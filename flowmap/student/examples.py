"""Example conditions: the inputs of a student's network other than x, t and s, with the right shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmap.data import TextEncoder
from flowmap.flow.types import Cond
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.student.config import StudentConfig
from flowmap.teachers.text import Sentence

MOST_TOKENS = {  # of prompts, by their pipelines' limits
    "FluxTransformer2DModel": 512,
    "Flux2Transformer2DModel": 512,
    "SanaTransformer2DModel": 300,
    "PixArtTransformer2DModel": 300,
    "QwenImageTransformer2DModel": 512,
    "ZImageTransformer2DModel": 512,
    "HunyuanImageTransformer2DModel": 1000,
    "Lumina2Transformer2DModel": 256,
    "AuraFlowTransformer2DModel": 256,
}


def conditions_of(config: StudentConfig, rows: int) -> Cond:
    cond: dict[str, Tensor] = {"class": torch.zeros(rows, dtype=torch.int64)} if config.num_classes else {}
    cond |= {one.name: one.example(rows) for one in config.extra_conditions}
    net = net_within(config.net)
    if isinstance(net, DiffusersModel):  # FLUX reads a scale of its own, guided or not
        return (
            cond | {"guidance": torch.ones(rows)} | example_conditions(net, rows, tokens_of(net.network, config.text))
        )
    return cond | ({"guidance": torch.ones(rows)} if config.guidance else {})


def empty_of(cond: Cond) -> Cond:
    """One row of example conditions in the place of those of an empty text."""
    return {key: value[:1] for key, value in cond.items() if key not in ("class", "guidance")}


def tokens_of(network: str, text: TextEncoder | None) -> int:
    """The number of text tokens that a network reads: its encoder's max_tokens, by default its pipeline's limit.

    SD3 has CLIP's 77 before those of T5.
    """
    most = None if text is None else text.max_tokens
    if isinstance(text, Sentence):
        return text.max_tokens
    if network == "SD3Transformer2DModel":
        return 77 + (most or 256)
    return most or MOST_TOKENS.get(network, 77)
