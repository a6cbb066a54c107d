"""A card says what a frozen teacher is: where its weights come from, what it predicts, on which schedule, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowmap.base.outside import read_settings

KINDS = ("recipe", "exact", "converted", "diffusers", "autoencoder")


@dataclass
class Card:
    """One file in teachers/. kind: "recipe" (trained by one of ours), "exact" (the data's own velocity), "diffusers", "converted" (published
    pickles, by `flowmap import`); "autoencoder" is no teacher, and says what its latents are: shape is that of a picture of `pixels` a side.

    network: what it is built of, so that its size is known where its weights are not; fetch: how to get them.
    """

    kind: str
    recipe: str | None = None
    source: str | None = None
    revision: str | None = None
    prediction: str = "velocity"
    schedule: str = "linear"
    shape: list[int] = field(default_factory=list)
    pixels: int | None = None
    num_classes: int | None = None
    parameters: int | None = None
    licence: str = "?"
    reference: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    fetch: str = ""
    name: str = ""

    @property
    def trained_by(self) -> str:
        """The recipe that trains it, of kind "recipe"."""
        assert self.recipe is not None  # read_card has checked
        return self.recipe

    @property
    def pipeline(self) -> str:
        """The folder or hub id, of kind "diffusers"."""
        assert self.source is not None  # read_card has checked
        return self.source

    def describe(self) -> str:
        origin = self.recipe or self.source or "closed form"
        return f"{self.kind} {origin}" + (f", {self.parameters / 1e6:.0f} M parameters" if self.parameters else "")


def read_card(path: Path) -> Card:
    """The card in that file; ValueError names the file, the key and what is allowed."""
    plain = read_settings(path, [one.name for one in fields(Card)], "card")
    try:
        card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Card), plain, {"name": path.stem}))
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path.name}: {str(error).splitlines()[0]}") from error
    assert isinstance(card, Card)
    if card.kind not in KINDS:
        raise ValueError(f"{path.name}: kind: {card.kind!r} is not one of {', '.join(KINDS)}")
    if card.kind == "diffusers" and not card.source:
        raise ValueError(f"{path.name}: source: a card of kind diffusers names a pipeline's folder or hub id")
    if card.kind == "diffusers" and not (card.shape and all(size > 0 for size in card.shape)):
        raise ValueError(
            f"{path.name}: shape: {card.shape} is not the shape of what the model denoises, such as [4, 32, 32]"
        )
    if card.kind == "autoencoder" and not (card.source and card.pixels and len(card.shape) == 3):
        raise ValueError(
            f"{path.name}: pixels: a card of kind autoencoder names source, pixels and the shape of their latents, such as [4, 32, 32]"
        )
    if card.kind == "recipe" and not card.recipe:
        raise ValueError(f"{path.name}: recipe: a card of kind recipe names the recipe that trains it")
    return card
