"""Teacher cards: the source of a frozen teacher's weights, its prediction, its schedule and its licence."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowmap.base.outside import read_settings

KINDS = ("recipe", "exact", "converted", "diffusers", "autoencoder")  # a recipe alone makes one of kind "module"


@dataclass
class Card:
    """A file in teachers/.

    kind: "recipe" (trained by one of our recipes), "exact" (the data's closed-form velocity), "diffusers",
    "converted" (published pickles, by `flowmap import`), or "autoencoder", which is not a teacher and describes
    latents: shape is that of the latents of an image with `pixels` per side. network: the network's settings, so that
    its size is known without weights. fetch: how to get the weights.
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
        """The recipe that trains it, for kind "recipe"."""
        assert self.recipe is not None  # read_card has checked
        return self.recipe

    @property
    def pipeline(self) -> str:
        """The folder or hub id, for kind "diffusers"."""
        assert self.source is not None  # read_card has checked
        return self.source

    def describe(self) -> str:
        origin = self.recipe or self.source or "closed form"
        return f"{self.kind} {origin}" + (f", {self.parameters / 1e6:.0f} M parameters" if self.parameters else "")


def read_card(path: Path) -> Card:
    """The card in a file. ValueErrors name the file, the key and the allowed values."""
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
        what = "is not the shape of what the model denoises, such as [4, 32, 32]"
        raise ValueError(f"{path.name}: shape: {card.shape} {what}")
    if card.kind == "autoencoder" and not (card.source and card.pixels and len(card.shape) == 3):
        needs = "names source, pixels and the shape of their latents, such as [4, 32, 32]"
        raise ValueError(f"{path.name}: pixels: a card of kind autoencoder {needs}")
    if card.kind == "recipe" and not card.recipe:
        raise ValueError(f"{path.name}: recipe: a card of kind recipe names the recipe that trains it")
    return card
