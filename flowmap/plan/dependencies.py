"""The recipes that a recipe depends on, each read once: they train its teacher, autoencoder, prior, start or pairs."""

from __future__ import annotations

from flowmap.data import Pairs, Styles, TeacherSlot
from flowmap.data.codes import Codes
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.plan.cards import cards_of, pairs_teacher
from flowmap.recipe.recipe import Recipe
from flowmap.recipe.settings import FromRecipe
from flowmap.teachers.card import Card


def pairs_spec(recipe: Recipe) -> Pairs:
    """Return the recipe's coupling, which must be pairs."""
    assert isinstance(recipe.coupling, Pairs)
    return recipe.coupling


def autoencoder_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipe that trains the autoencoder of the data, if one does."""
    autoencoder = recipe.data.autoencoder
    if autoencoder is None or autoencoder.recipe is None:
        return []
    overrides = autoencoder.overrides if isinstance(autoencoder, TextAutoencoder) else ()
    return [recipe.named(autoencoder.recipe, overrides)]


def code_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipe that trains the encoder of codes, if they are the data."""
    data = recipe.data
    return [recipe.named(data.recipe, data.overrides)] if isinstance(data, Codes) and data.recipe else []


def prior_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipe that trains a learned prior's auxiliary model, then the one of its flow of codes, if it has
    them.
    """
    prior = recipe.prior
    if not isinstance(prior, Learned):
        return []
    flow = [recipe.named(prior.z.recipe, prior.z.overrides)] if isinstance(prior.z, FlowCodes) else []
    return [recipe.named(prior.recipe, prior.overrides), *flow]


def teacher_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that train the teacher and its weak model."""
    return trained_recipes(recipe, recipe.teacher)


def start_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipe that trains the student from which this one starts, if it starts from one."""
    return [recipe.named(recipe.start.recipe, recipe.start.overrides)] if isinstance(recipe.start, FromRecipe) else []


def pairs_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that train what makes the pairs."""
    made_by = pairs_spec(recipe).recipe
    return trained_recipes(recipe, pairs_teacher(recipe)) if made_by is None else [recipe.named(made_by)]


def weights_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that train what the student is trained with or starts from.

    Those of its autoencoder and of its pairs are not among them.
    """
    return [*code_recipes(recipe), *prior_recipes(recipe), *teacher_recipes(recipe), *start_recipes(recipe)]


def styles_of(recipe: Recipe) -> Styles | None:
    """Return the two styles that the recipe's flow connects, or None.

    They are its coupling, or the coupling of the editing flow that made its pairs.
    """
    if isinstance(recipe.coupling, Styles):
        return recipe.coupling
    made_by = pairs_recipes(recipe) if isinstance(recipe.coupling, Pairs) else []
    return styles_of(made_by[0]) if made_by else None


def trained_by(recipe: Recipe, slot: TeacherSlot, card: Card) -> Recipe | None:
    """Return the recipe that trains a card of the slot, with the slot's overrides; None for other kinds of cards."""
    return recipe.named(card.trained_by, slot.overrides) if card.kind == "recipe" else None


def trained_recipes(recipe: Recipe, slot: TeacherSlot | None) -> list[Recipe]:
    """Return the recipes that train the slot's cards."""
    if slot is None:
        return []
    found = (trained_by(recipe, slot, card) for card in cards_of(slot))
    return [trained for trained in found if trained is not None]
