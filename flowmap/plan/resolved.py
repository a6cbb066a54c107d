"""A recipe with everything that it names: folder, needed runs, cards, data and networks, each determined once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from flowmap.base.schema import RecipeError
from flowmap.data import Pairs, Styles, TeacherSamples
from flowmap.flow.prior import Learned
from flowmap.nets.stacked import Stacked
from flowmap.objectives import FlowMatching
from flowmap.plan.cards import card_of, cards_of, pairs_teacher
from flowmap.plan.data_folders import data_of, pairs_of
from flowmap.plan.dependencies import (
    autoencoder_recipes,
    code_recipes,
    pairs_recipes,
    prior_recipes,
    start_recipes,
    styles_of,
    teacher_recipes,
)
from flowmap.plan.named_networks import as_started, shipped_net, spec_of, stacked
from flowmap.plan.run_folders import dependency_folder, is_complete
from flowmap.plan.teacher_samples import samples_of
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import StudentSpec
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.prior import Shipped, auxiliary
from flowmap.teachers.card import Card


@dataclass(frozen=True, eq=False)
class Resolved:
    """A recipe and everything that it names.

    Each member is determined when it is first used and then kept; `complete` alone reads the folder every time. Runs
    that need one another are members of one tree, in which each needed recipe has one object.

    given: the folder of the run. Without it, the folder is the one where other recipes find the run. runs: the needed
    runs of the tree, by the id of their recipe.
    """

    recipe: Recipe
    given: Path | None = None
    runs: dict[int, Any] = field(default_factory=dict, repr=False)

    def of(self, recipe: Recipe) -> Self:
        """Return the run of a needed recipe, the same object each time."""
        if id(recipe) not in self.runs:
            self.runs[id(recipe)] = type(self)(recipe, None, self.runs)
        return self.runs[id(recipe)]

    def changed(self, **fields: Any) -> Self:
        """Return this run with other values in those fields of its recipe. What it needs is not resolved again."""
        return replace(self, recipe=self.recipe.changed(**fields), given=self.folder)

    @property
    def name(self) -> str:
        return self.recipe.name

    @cached_property
    def folder(self) -> Path:
        return dependency_folder(self.recipe) if self.given is None else self.given

    @property
    def complete(self) -> bool:
        return is_complete(self.folder, self.recipe)

    def finished(self, needed: Self, slot: str) -> Path:
        """Return the folder of a run that `slot` of this recipe names. Raise RecipeError unless it is finished."""
        if not (needed.folder / "metrics.json").is_file():
            how = f"`flowmap fit --recipe {self.name}` trains it first"
            raise RecipeError(f"{self.name}: {slot}: {needed.recipe.name!r} is not trained yet; {how}")
        return needed.folder

    @cached_property
    def autoencoders(self) -> list[Self]:
        """The run that trains the autoencoder of the data, if one does."""
        return self._all(autoencoder_recipes(self.recipe))

    @cached_property
    def coders(self) -> list[Self]:
        """The run that trains the encoder of codes, if they are the data."""
        return self._all(code_recipes(self.recipe))

    @cached_property
    def priors(self) -> list[Self]:
        """The run that trains a learned prior's auxiliary model, then the one of its flow of codes."""
        return self._all(prior_recipes(self.recipe))

    @cached_property
    def teachers(self) -> list[Self]:
        """The runs that train the teacher and its weak model."""
        return self._all(teacher_recipes(self.recipe))

    @cached_property
    def starts(self) -> list[Self]:
        """The run that trains the student from which this one starts, if it starts from one."""
        return self._all(start_recipes(self.recipe))

    @cached_property
    def pairs_teachers(self) -> list[Self]:
        """The runs that train what makes the pairs."""
        return self._all(pairs_recipes(self.recipe) if isinstance(self.recipe.coupling, Pairs) else [])

    def trainer_of(self, card: Card) -> Self:
        """Return the run that trains the network of a card of kind "recipe" in the slot of the teacher."""
        assert self.recipe.teacher is not None
        return self.of(self.recipe.named(card.trained_by, self.recipe.teacher.overrides))

    def _all(self, recipes: list[Recipe]) -> list[Self]:
        return [self.of(recipe) for recipe in recipes]

    @cached_property
    def cards(self) -> list[Card]:
        """The cards of the teacher and of its weak model."""
        return cards_of(self.recipe.teacher)

    @cached_property
    def pairs_cards(self) -> list[Card]:
        """The cards of the teacher that makes the pairs, and of its weak model."""
        return cards_of(pairs_teacher(self.recipe))

    @cached_property
    def data(self) -> Any:
        """The settings of the data with folders in place of names."""
        if isinstance(self.recipe.data, TeacherSamples):
            return replace(samples_of(self), root=self.sampled.pairs.root)
        return data_of(self.recipe, lambda recipe: self.of(recipe).folder)

    @cached_property
    def sampled(self) -> Self:
        """The run whose pairs are the teacher's samples that are this run's data."""
        data, teacher = samples_of(self), self.recipe.teacher
        assert teacher is not None  # The data has checked it.
        return self.changed(data=data.blank(), coupling=data.pairs(teacher), objective=FlowMatching(), metrics=())

    @cached_property
    def pairs(self) -> Pairs:
        """The settings of the pairs with their folder; the coupling must be pairs."""
        return pairs_of(self.recipe)

    @cached_property
    def styles(self) -> Styles | None:
        """The two styles that the flow connects, or None."""
        return styles_of(self.recipe)

    @cached_property
    def net(self) -> StudentSpec | None:
        """The settings of the student's network, following what it starts from; None if nothing states them."""
        net: StudentSpec | None = self.recipe.start
        if isinstance(net, FromRecipe):
            net = shipped_net(self.starts[0].net)
        elif isinstance(net, FromTeacher):
            net = self.spec_of(card_of(self.recipe.teacher)) if self.recipe.teacher is not None else None
        net = as_started(self.recipe, net)
        return stacked(net) if isinstance(self.recipe.student, Stacked) and net is not None else net

    @cached_property
    def teacher_nets(self) -> list[StudentSpec | None]:
        """The settings of the network of each card; None for an exact teacher, or if nothing states them."""
        return [None if card.kind == "exact" else self.spec_of(card) for card in self.cards]

    def spec_of(self, card: Card) -> StudentSpec | None:
        """Return the settings of a card's network without its weights, or None if nothing states them."""
        return shipped_net(self.trainer_of(card).net) if card.kind == "recipe" else spec_of(card)

    @cached_property
    def prior(self) -> Shipped | None:
        """How the student records its learned prior, known before that is trained; None for the Gaussian prior."""
        prior = self.recipe.prior
        if not isinstance(prior, Learned):
            return None
        trained = self.priors[0].recipe
        if trained.artifact != "prior":
            raise RecipeError(
                f"{self.name}: prior.recipe: {trained.name!r} trains no auxiliary model: "
                "its objective is not variance_guided"
            )
        size = auxiliary(trained.student).size
        return Shipped(size, prior.scale, prior.conditioning, trained.name, trained.hash())
