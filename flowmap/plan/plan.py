"""Resolve a recipe once: the run, what its recipe names, and what it needs before, in order.

The stages of a run are runs of other recipes, encoded data, pairs and statistics of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded, Pairs, TeacherSamples, pairs
from flowmap.data.outline import DataOutline
from flowmap.plan.cards import lora_card
from flowmap.plan.data_folders import finished_index
from flowmap.plan.outlines import stated_outline
from flowmap.plan.provenance import pairs_identity
from flowmap.plan.references import ReferenceStatistics, references_of
from flowmap.plan.resolved import Resolved
from flowmap.plan.run_folders import runs_root
from flowmap.recipe import Recipe


@dataclass(frozen=True, eq=False)
class ResolvedRun(Resolved):
    """A run with the stages that it needs, and the outline of its data."""

    @cached_property
    def outline(self) -> DataOutline | None:
        """Shape, classes and class names of the data as far as they are known without reading it; None if nothing
        states the shape.
        """
        return stated_outline(self)

    @cached_property
    def stages(self) -> list[Needed]:
        """All stages that the run needs, in order, the run itself last; RecipeError if recipes need each other."""
        if self.recipe.lora is not None:
            lora_card(self.recipe)
        stages: list[Needed] = []
        for needed in self._needs((self.name,)):
            if all(stage.folder != needed.folder for stage in stages):
                stages.append(needed)
        return [*stages, self]

    def _needs(self, chain: tuple[str, ...]) -> list[Needed]:
        found: list[Needed] = []
        for needed in self.autoencoders:
            found += self._with_needs(needed, chain)
        if isinstance(self.recipe.data, Encoded):
            found.append(Encoding(self))
        for needed in (*self.coders, *self.priors, *self.teachers, *self.starts):
            found += self._with_needs(needed, chain)
        if isinstance(self.recipe.data, TeacherSamples):
            found.append(Sampling(self.sampled))
        if isinstance(self.recipe.coupling, Pairs):
            pairing = Pairing(self)
            for needed in [] if pairing.complete else self.pairs_teachers:
                found += self._with_needs(needed, chain)
            found.append(pairing)
        return [*found, *references_of(self.recipe)]

    def _with_needs(self, needed: ResolvedRun, chain: tuple[str, ...]) -> list[Needed]:
        name = needed.recipe.name
        if name in chain:
            loop = " -> ".join((*chain, name))
            raise RecipeError(f"{self.name}: recipes need each other in a loop: {loop}")
        return [*needed._needs((*chain, name)), needed]


Stage = ResolvedRun  # The name of a run among the stages of another.


@dataclass(frozen=True)
class Encoding:
    """Pictures to encode into latents and text embeddings, and the folder of the result."""

    run: ResolvedRun

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def spec(self) -> Encoded:
        return self.run.data

    @property
    def makes(self) -> str:
        return "a data set on disk" if self.spec.autoencoder is None else "latents"

    @property
    def folder(self) -> Path:
        return Path(self.spec.root)

    @property
    def complete(self) -> bool:
        return finished_index(self.spec) is not None


@dataclass(frozen=True)
class Pairing:
    """Pairs to make with a teacher's ODE, and their folder."""

    run: ResolvedRun

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def makes(self) -> str:
        return f"{self.run.pairs.num} pairs"

    @property
    def folder(self) -> Path:
        return Path(self.run.pairs.root)

    @property
    def complete(self) -> bool:
        try:
            there = pairs.read_index(self.folder)["identity"]
            return pairs.first_difference(there, pairs_identity(self.run)) is None
        except ValueError:  # It is missing or damaged, or its data is not encoded yet.
            return False


class Sampling(Pairing):
    """Samples of the teacher to make, which are the data of a run; `run` is its `sampled`."""

    @property
    def makes(self) -> str:
        return f"{self.run.pairs.num} samples of the teacher"


Needed = Stage | Encoding | Pairing | ReferenceStatistics


def resolve(recipe: Recipe, folder: Path | None = None) -> ResolvedRun:
    """Return the recipe's run, by default in runs/<name>."""
    return ResolvedRun(recipe, runs_root() / recipe.name if folder is None else folder)


def plan(recipe: Recipe, folder: Path) -> list[Needed]:
    """Return all stages that the recipe needs, in order; the last is the recipe itself.

    Raises RecipeError if recipes need each other in a loop.
    """
    return resolve(recipe, folder).stages
