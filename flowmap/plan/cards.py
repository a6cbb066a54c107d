"""Cards of frozen teachers: the card that a recipe names, and the folder of its weights."""

from __future__ import annotations

import copy
import difflib
import os
from functools import lru_cache
from pathlib import Path

from flowmap.base.schema import RecipeError, to_plain
from flowmap.data import Pairs, TeacherSlot
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.module_teacher import ModuleTeacher
from flowmap.recipe.recipe import Recipe, shipped
from flowmap.recipe.settings import Autoguidance
from flowmap.teachers.card import Card, read_card


def pairs_teacher(recipe: Recipe) -> TeacherSlot | None:
    """Return the teacher that makes the recipe's pairs, or None if another recipe's student makes them."""
    return recipe.coupling.teacher if isinstance(recipe.coupling, Pairs) else None


def cards_of(slot: TeacherSlot | None) -> list[Card]:
    """Return the cards of a slot and of its weak model."""
    if slot is None:
        return []
    weak = [slot.guidance.weak] if isinstance(slot.guidance, Autoguidance) and slot.guidance.weak else []
    return [card_of(slot), *map(find_card, weak)]


def card_of(slot: TeacherSlot) -> Card:
    """Return the card that the slot names. For a teacher named by its recipe, return a card of kind "recipe"."""
    if isinstance(slot, ModuleTeacher):
        settings = to_plain(slot.net, TABLES)
        shape, classes = list(slot.shape), slot.classes
        return Card(
            kind="module",
            name=slot.name,
            source=slot.weights,
            revision=slot.digest or slot.sha256,
            shape=shape,
            num_classes=classes,
            network=settings,
        )
    ours = Card(kind="recipe", recipe=slot.recipe, name=slot.recipe or "")
    card = ours if slot.card is None else find_card(slot.card)
    if card.kind == "autoencoder":
        raise RecipeError(
            f"teacher.card: {card.name!r} is an autoencoder's, and no teacher; data.autoencoder.source names it"
        )
    return card


def lora_card(recipe: Recipe) -> Card:
    """Return the card of the teacher that supplies the frozen weights under the recipe's LoRA student.

    Raises RecipeError if it is not a diffusers model.
    """
    card = card_of(recipe.teacher) if recipe.teacher else None
    if card is None or card.kind != "diffusers":
        what = "there is none" if card is None else f"{card.name!r} is of kind {card.kind}"
        raise RecipeError(f"{recipe.name}: student.lora: wants a teacher of kind diffusers; {what}")
    return card


def weights_folder(card: Card) -> Path:
    """Return the folder where `flowmap import` puts a published network's weights: weights/<card>.

    The environment variable FLOWMAP_WEIGHTS replaces `weights`.
    """
    return Path(os.environ.get("FLOWMAP_WEIGHTS", "weights")) / card.name


def find_card(name: str) -> Card:
    """Return the shipped card of that name, or the card in the file of that path."""
    path = Path(name) if Path(name).is_file() else shipped("teachers") / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        cards = list_cards()
        close = difflib.get_close_matches(name, cards, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"teacher.card: no card {name!r}{hint} Cards: {', '.join(cards)}")
    state = path.stat()
    card = copy.copy(_read_card(path.resolve(), state.st_size, state.st_mtime_ns))
    # A pipeline that was converted or fetched to the weights folder is read from there.
    if card.kind == "diffusers" and (weights_folder(card) / "model_index.json").is_file():
        card.source, card.revision = str(weights_folder(card)), None
    return card


@lru_cache(maxsize=256)
def _read_card(path: Path, size: int, changed: int) -> Card:
    """Return the card in that file; size and time of change make an edited file be read again."""
    try:
        return read_card(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def list_cards() -> list[str]:
    root = shipped("teachers")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
