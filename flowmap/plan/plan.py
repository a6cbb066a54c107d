"""Resolve a recipe once: the run, what its recipe names, and what it needs before, in order.

The stages of a run are runs of other recipes, encoded data and pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded, Pairs, pairs
from flowmap.data.encoded import read_index
from flowmap.data.shards import difference
from flowmap.plan.cards import lora_card, pairs_cards, teacher_cards
from flowmap.plan.data_folders import data_of, pairs_of
from flowmap.plan.dependencies import (
    autoencoder_recipes,
    pairs_recipes,
    prior_recipes,
    start_recipes,
    teacher_recipes,
    weights_recipes,
)
from flowmap.plan.named_networks import net_of, spec_of
from flowmap.plan.provenance import pairs_identity
from flowmap.plan.references import ReferenceStatistics, references_of
from flowmap.plan.requirements import shipped_prior
from flowmap.plan.run_folders import dependency_folder, is_complete, runs_root
from flowmap.recipe.kinds import StudentSpec
from flowmap.recipe.recipe import Recipe
from flowmap.student.prior import Shipped
from flowmap.teachers.card import Card


@dataclass(frozen=True)
class ResolvedRun:
    """A recipe with its run folder and all that the recipe names.

    Each member is determined when it is first used and then kept. Only `complete` reads the folder every time.
    """

    recipe: Recipe
    folder: Path

    @property
    def complete(self) -> bool:
        return is_complete(self.folder, self.recipe)

    @cached_property
    def stages(self) -> list[Needed]:
        """All stages that the run needs, in order, the run itself last; RecipeError if recipes need each other."""
        if self.recipe.lora is not None:
            lora_card(self.recipe)
        stages: list[Needed] = []
        for needed in _needs(self.recipe, (self.recipe.name,)):
            if all(stage.folder != needed.folder for stage in stages):
                stages.append(needed)
        return [*stages, self]

    @cached_property
    def cards(self) -> list[Card]:
        """The cards of the teacher and of its weak model."""
        return teacher_cards(self.recipe)

    @cached_property
    def teacher_nets(self) -> list[StudentSpec | None]:
        """The settings of the network of each card; None for an exact teacher, or if nothing states them."""
        return [None if card.kind == "exact" else spec_of(card, self.recipe) for card in self.cards]

    @cached_property
    def teachers(self) -> list[Recipe]:
        """The recipes that train the teacher and its weak model."""
        return teacher_recipes(self.recipe)

    @cached_property
    def starts(self) -> list[Recipe]:
        """The recipe that trains the student from which this one starts, if it starts from one."""
        return start_recipes(self.recipe)

    @cached_property
    def pairs_cards(self) -> list[Card]:
        """The cards of the teacher that makes the pairs, and of its weak model."""
        return pairs_cards(self.recipe)

    @cached_property
    def pairs_teachers(self) -> list[Recipe]:
        """The recipes that train what makes the pairs."""
        return pairs_recipes(self.recipe) if isinstance(self.recipe.coupling, Pairs) else []

    @cached_property
    def priors(self) -> list[Recipe]:
        """The recipe that trains a learned prior's auxiliary model, then the one of its flow of codes."""
        return prior_recipes(self.recipe)

    @cached_property
    def prior(self) -> Shipped | None:
        """How the student records its learned prior; None for the Gaussian prior."""
        return shipped_prior(self.recipe)

    @cached_property
    def data(self) -> Any:
        """The settings of the data with folders in place of names."""
        return data_of(self.recipe)

    @cached_property
    def net(self) -> StudentSpec | None:
        """The settings of the student's network; None if nothing states them."""
        return net_of(self.recipe)


Stage = ResolvedRun  # The name of a run among the stages of another.


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


Needed = Stage | Encoding | Pairing | ReferenceStatistics


def resolve(recipe: Recipe, folder: Path | None = None) -> ResolvedRun:
    """Return the recipe's run, by default in runs/<name>."""
    return ResolvedRun(recipe, runs_root() / recipe.name if folder is None else folder)


def plan(recipe: Recipe, folder: Path) -> list[Needed]:
    """Return all stages that the recipe needs, in order; the last is the recipe itself.

    Raises RecipeError if recipes need each other in a loop.
    """
    return resolve(recipe, folder).stages


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
    return [*found, *references_of(recipe)]


def _with_needs(recipe: Recipe, needed: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    if needed.name in chain:
        raise RecipeError(f"{recipe.name}: recipes need each other in a loop: {' -> '.join((*chain, needed.name))}")
    return [*_needs(needed, (*chain, needed.name)), Stage(needed, dependency_folder(needed))]
