"""What is known of a text data set before any network is loaded."""

from __future__ import annotations

from typing import Any

import torch

from flowmap.build.text import OnTokens
from flowmap.data import Text, TextDataset
from flowmap.data.text.dataset import Attribute
from flowmap.data.text.tokens import BPE, Pair, Pretrained
from flowmap.plan.dependencies import autoencoder_recipes
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import StudentSpec


def described(recipe: Recipe) -> tuple[TextDataset, list[str]]:
    """The recipe's data as far as it is known without any network, with no sentence in it, and what is missing on this machine."""
    spec, missing, trained = recipe.data, list[str](), autoencoder_recipes(recipe)
    assert isinstance(spec, Text)
    attributes: tuple[Attribute, ...] = ()
    tokenizer = spec.tokenizer or BPE()
    shape: tuple[int, ...] = (tokenizer.max_tokens * (2 if isinstance(tokenizer, Pair) else 1),)
    try:
        if spec.autoencoder is not None:
            shape = _latent_shape(trained[0].student) if trained else spec.autoencoder.load().shape
        attributes = spec.read()[2] if "???" not in repr(spec.sentences) else ()
    except ValueError as error:
        missing.append(str(error))
    latents = torch.zeros(1, *shape) if spec.autoencoder is not None else None
    codes = {"left": latents, "right": latents} if spec.infill and latents is not None else {}
    tokens = None if spec.autoencoder is not None else _unfitted(tokenizer, missing)
    data = TextDataset(
        "text", torch.zeros(0, *shape), torch.zeros(0, *shape), attributes=attributes, codes=codes, tokens=tokens
    )
    return data, missing


def _latent_shape(net: StudentSpec) -> tuple[int, ...]:
    assert isinstance(net, OnTokens)
    return net.latent_shape


def _unfitted(spec, missing: list[str]) -> Any:
    """The tokenizer itself where no sentence trains it, else as much of it as is known; why it cannot be had is told among what is missing."""
    if isinstance(spec, (Pair, Pretrained)):
        try:
            return spec.fit([])
        except ValueError as error:
            missing.append(str(error))
    return _Unfitted(spec)


class _Unfitted:
    """As much of a tokenizer as a network is told, before it has seen a sentence."""

    def __init__(self, spec):
        self.pair = isinstance(spec, Pair)
        self.vocab = 0 if self.pair else getattr(spec, "vocab", 50_000)
        self.max_tokens = spec.max_tokens

    def conditioning(self) -> dict[str, Any]:
        return {"special": (0, 1, 2, 3)} | ({"encoder_tokens": self.max_tokens} if self.pair else {})
