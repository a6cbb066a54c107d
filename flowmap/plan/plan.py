"""What a recipe needs before it can run, in order: runs of other recipes, encoded data, pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded, Pairs, pairs
from flowmap.data.encoded import read_index
from flowmap.data.shards import difference
from flowmap.plan.cards import lora_card
from flowmap.plan.data_folders import data_of, pairs_of
from flowmap.plan.dependencies import autoencoder_recipes, pairs_recipes, weights_recipes
from flowmap.plan.provenance import pairs_identity
from flowmap.plan.run_folders import dependency_folder, is_complete
from flowmap.recipe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One run: a recipe and its run folder."""

    recipe: Recipe
    folder: Path

    @property
    def complete(self) -> bool:
        return is_complete(self.folder, self.recipe)


@dataclass(frozen=True)
class Encoding:
    """Pictures to encode into latents and text embeddings, and the folder of the result."""

    recipe: Recipe

    @cached_property
    def spec(self) -> Encoded:
        return data_of(self.recipe)

    @property
    def makes(self) -> str:
        return "a data set on disk" if self.spec.autoencoder is None else "latents"

    @property
    def folder(self) -> Path:
        return Path(self.spec.root)

    @property
    def complete(self) -> bool:
        try:
            index, spec = read_index(self.folder), self.spec
            return difference(index["identity"] | index["chosen"], spec.identity() | spec.chosen()) is None
        except ValueError:  # It is missing or damaged, or its autoencoder is not trained yet.
            return False


@dataclass(frozen=True)
class Pairing:
    """Pairs to make with a teacher's ODE, and their folder."""

    recipe: Recipe

    @cached_property
    def folder(self) -> Path:
        return Path(pairs_of(self.recipe).root)

    @property
    def complete(self) -> bool:
        try:
            there = pairs.read_index(self.folder)["identity"]
            return pairs.first_difference(there, pairs_identity(self.recipe)) is None
        except ValueError:  # It is missing or damaged, or its data is not encoded yet.
            return False


Needed = Stage | Encoding | Pairing


def plan(recipe: Recipe, folder: Path) -> list[Needed]:
    """Return all stages that the recipe needs, in order; the last is the recipe itself.

    Raises RecipeError if recipes need each other in a loop.
    """
    if recipe.lora is not None:
        lora_card(recipe)
    stages: list[Needed] = []
    for needed in _needs(recipe, (recipe.name,)):
        if all(stage.folder != needed.folder for stage in stages):
            stages.append(needed)
    return [*stages, Stage(recipe, folder)]


def _needs(recipe: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    found: list[Needed] = []
    for needed in autoencoder_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.data, Encoded):
        found.append(Encoding(recipe))
    for needed in weights_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.coupling, Pairs):
        pairing = Pairing(recipe)
        for needed in [] if pairing.complete else pairs_recipes(recipe):
            found += _with_needs(recipe, needed, chain)
        found.append(pairing)
    return found


def _with_needs(recipe: Recipe, needed: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    if needed.name in chain:
        raise RecipeError(f"{recipe.name}: recipes need each other in a loop: {' -> '.join((*chain, needed.name))}")
    return [*_needs(needed, (*chain, needed.name)), Stage(needed, dependency_folder(needed))]
