"""What a recipe needs before it can run, in order: autoencoders and teachers that recipes train, each in a run folder of its own, and latents."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flowmap.config import RecipeError, to_plain
from flowmap.data import Encoded
from flowmap.data.dataset import Source
from flowmap.data.encoded import difference, read_index
from flowmap.recipe import TABLES, Autoguidance, Recipe, read_recipe, read_resolved, shipped
from flowmap.teachers.card import Card, read_card


@dataclass(frozen=True)
class Stage:
    """One run: a recipe and the folder that it fills."""

    recipe: Recipe
    folder: Path

    @property
    def complete(self) -> bool:
        return is_complete(self.folder, self.recipe)


def runs_root() -> Path:
    """Where runs go: $FLOWMAP_RUNS, or runs/ below the current folder."""
    return Path(os.environ.get("FLOWMAP_RUNS", "runs"))


@dataclass(frozen=True)
class Encoding:
    """Pictures that become latents and text embeddings, and the folder that holds them."""

    recipe: Recipe

    @property
    def spec(self) -> Encoded:
        return data_of(self.recipe)

    @property
    def folder(self) -> Path:
        return Path(self.spec.root)

    @property
    def complete(self) -> bool:
        try:
            index, spec = read_index(self.folder), self.spec
            return difference(index["identity"] | index["chosen"], spec.identity() | spec.chosen()) is None
        except ValueError:  # not there, torn, or its autoencoder is still to be trained
            return False


def plan(recipe: Recipe, folder: Path) -> list[Stage | Encoding]:
    """What leads to the recipe, in order, itself the last. RecipeError where recipes need each other in a loop."""
    if recipe.lora is not None:
        lora_card(recipe)
    stages: list[Stage | Encoding] = []
    for needed in _needs(recipe, (recipe.name,)):
        if all(stage.folder != needed.folder for stage in stages):
            stages.append(needed)
    return [*stages, Stage(recipe, folder)]


def _needs(recipe: Recipe, chain: tuple[str, ...]) -> list[Stage | Encoding]:
    found: list[Stage | Encoding] = []
    for needed in autoencoder_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.data, Encoded):
        found.append(Encoding(recipe))
    for needed in teacher_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    return found


def _with_needs(recipe: Recipe, needed: Recipe, chain: tuple[str, ...]) -> list[Stage | Encoding]:
    if needed.name in chain:
        raise RecipeError(f"{recipe.name}: recipes need each other in a loop: {' -> '.join((*chain, needed.name))}")
    return [*_needs(needed, (*chain, needed.name)), Stage(needed, dependency_folder(needed))]


def autoencoder_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe that trains the autoencoder of the data, where one does."""
    autoencoder = getattr(recipe.data, "autoencoder", None)
    return [read_recipe(autoencoder.recipe)] if autoencoder is not None and autoencoder.recipe is not None else []


def data_of(recipe: Recipe) -> Any:
    """The recipe's data with folders in the place of names: where its latents lie, and where the run that trains its autoencoder does."""
    data = recipe.data
    if not isinstance(data, Encoded):
        return data
    trained = autoencoder_recipes(recipe)
    if trained:
        source = str(dependency_folder(trained[0]) / "student")
        data = replace(data, autoencoder=replace(data.autoencoder, source=source, recipe=None))
    return data if data.root else replace(data, root=str(runs_root() / f"encoded-{_encoding_hash(recipe, trained)}"))


def _encoding_hash(recipe: Recipe, trained: list[Recipe]) -> str:
    """Eight hexadecimal digits of all that the stored samples depend on: recipes that share them share the folder."""
    plain = {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in (f.name for f in fields(Source))}
    return hashlib.sha256(repr((plain, [one.hash() for one in trained])).encode()).hexdigest()[:8]


def teacher_cards(recipe: Recipe) -> list[Card]:
    """The cards of the teacher and of its weak companion, where there are any."""
    if recipe.teacher is None:
        return []
    guidance = recipe.teacher.guidance
    weak = [guidance.weak] if isinstance(guidance, Autoguidance) and guidance.weak else []
    return [find_card(name) for name in [recipe.teacher.card, *weak]]


def lora_card(recipe: Recipe) -> Card:
    """The card of the teacher whose frozen weights lie under the recipe's LoRA student; RecipeError where it is no diffusers model."""
    card = find_card(recipe.teacher.card) if recipe.teacher else None
    if card is None or card.kind != "diffusers":
        what = "there is none" if card is None else f"{card.name!r} is of kind {card.kind}"
        raise RecipeError(f"{recipe.name}: student.lora: wants a teacher of kind diffusers; {what}")
    return card


def teacher_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes that train those cards, with the slot's overrides; none for other kinds of cards."""
    return [read_recipe(card.recipe, recipe.teacher.overrides) for card in teacher_cards(recipe) if card.kind == "recipe"]


def find_card(name: str) -> Card:
    """The shipped card of that name, or the card file at that path."""
    path = Path(name) if Path(name).is_file() else shipped("teachers") / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        import difflib

        cards = list_cards()
        close = difflib.get_close_matches(name, cards, n=1)
        raise RecipeError(f"teacher.card: no card {name!r}{f', did you mean {close[0]!r}?' if close else ''} Cards: {', '.join(cards)}")
    try:
        return read_card(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def list_cards() -> list[str]:
    root = shipped("teachers")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def dependency_folder(recipe: Recipe) -> Path:
    """runs/<name> if it holds this very recipe's finished run, else runs/<name>-<hash>, so that no run is overwritten by another."""
    plain = runs_root() / recipe.name
    return plain if is_complete(plain, recipe) else runs_root() / f"{recipe.name}-{recipe.hash()}"


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """The folder holds a finished run of this recipe: metrics.json is written last."""
    return (folder / "metrics.json").is_file() and (folder / "student").is_dir() and holds(folder, recipe)


def holds(folder: Path, recipe: Recipe) -> bool:
    """The folder's recipe.yaml is this recipe (up to how it is logged)."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return False
    try:
        return read_resolved(path).hash() == recipe.hash()
    except RecipeError:
        return False
