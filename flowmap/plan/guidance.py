"""Whether a recipe's guidance has what it extrapolates from: conditions in the data, and a teacher that was trained without them too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flowmap.base.schema import RecipeError
from flowmap.data import TeacherSlot
from flowmap.data.images.folder import Folder, FolderImages
from flowmap.data.outline import DataOutline
from flowmap.data.tensors import Tensors
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.plan.cards import card_of, pairs_teacher
from flowmap.plan.dependencies import start_recipes
from flowmap.plan.named_networks import spec_of
from flowmap.recipe import Recipe
from flowmap.recipe.settings import ClassifierFree, Embedded, FromRecipe, FromTeacher
from flowmap.teachers.card import Card


def check_guidance(recipe: Recipe) -> None:
    """RecipeError where a guidance has no effect, or needs the velocity without a condition of a network that never learned it."""
    for key, slot in _slots(recipe):
        _check_slot(recipe, key, slot)
    if abs(recipe.distillation.null_weight) > 1e-9 and not _drops(recipe):
        raise RecipeError(
            f"{recipe.name}: objective.omega: guidance in the target asks the student without a condition, which it never learns: "
            "data.drop_condition is 0; take 0.1, say"
        )


def check_conditions(recipe: Recipe, data: DataOutline) -> None:
    """Raise RecipeError if classifier-free guidance is configured for data that has neither classes nor text."""
    if data.num_classes or set(data.conditions) - {"class", "z"}:
        return
    for key, slot in _slots(recipe):
        if isinstance(slot.guidance, ClassifierFree):
            raise RecipeError(_no_conditions(recipe, key))


def _no_conditions(recipe: Recipe, key: str) -> str:
    return f"{recipe.name}: {key}.guidance: classifier_free has no effect: the data has neither classes nor text; leave it out"


def _known_to_have_none(data: Any) -> bool:
    """Whether the data's settings, or a look at the folder's names, say that there are neither classes nor text."""
    images = (
        FolderImages(data.size, data.channels, data.root, captions=False)
        if isinstance(data, Folder)
        else getattr(data, "images", None)
    )
    if isinstance(data, Tensors):
        return not data.num_classes
    try:
        return isinstance(images, FolderImages) and getattr(data, "text", None) is None and images.num_classes() is None
    except ValueError:  # no such folder, which building it says
        return False


def guidance_warnings(recipe: Recipe) -> list[str]:
    """A line for each guidance of which it cannot be known whether its network learned the velocity without a condition."""
    return [
        f"{key}.guidance: classifier_free asks {card.name!r} without a class; NVIDIA's published class-conditional networks were, as far as is "
        "known, always trained with one: look at the teacher's samples, or take autoguidance"
        for key, slot in _slots(recipe)
        if isinstance(slot.guidance, ClassifierFree) and (card := card_of(slot)).kind == "converted"
    ]


def _slots(recipe: Recipe) -> Iterator[tuple[str, TeacherSlot]]:
    slots = (("teacher", recipe.teacher), ("coupling.teacher", pairs_teacher(recipe)))
    return ((key, slot) for key, slot in slots if slot is not None)


def _check_slot(recipe: Recipe, key: str, slot: TeacherSlot) -> None:
    card, free = card_of(slot), isinstance(slot.guidance, ClassifierFree)
    if free and not recipe.data.conditional:
        raise RecipeError(
            f"{recipe.name}: {key}.guidance: classifier_free has no effect: data.conditional is false; leave one of them out"
        )
    if free and _known_to_have_none(recipe.data):
        raise RecipeError(_no_conditions(recipe, key))
    asks = (
        f"{key}.guidance: classifier_free asks"
        if free
        else "data.drop_condition: above 0 asks"
        if _drops(recipe)
        else None
    )
    if asks and card.kind == "recipe":
        trained = recipe.named(card.trained_by, slot.overrides)
        if trained.data.conditional and recipe.data.conditional and not _knows_nothing(trained):
            raise RecipeError(
                f"{recipe.name}: {asks} the teacher without a condition, and {trained.name!r} never learned that: its data.drop_condition is 0; "
                "train it with 0.1, say"
            )
    if card.kind == "diffusers":
        _check_pretrained(recipe, key, slot, card, asks)


def _check_pretrained(recipe: Recipe, key: str, slot: TeacherSlot, card: Card, asks: str | None) -> None:
    spec = spec_of(card, recipe)
    if not isinstance(spec, DiffusersModel):
        return
    settings, embedded = json.loads(spec.settings), isinstance(slot.guidance, Embedded)
    labelled = settings.get("num_class_embeds") is not None or settings.get("class_embed_type") is not None
    if asks and spec.network == "UNet2DModel" and labelled:
        raise RecipeError(
            f"{recipe.name}: {asks} {card.name!r} without a class, and a UNet2DModel has no label for none"
        )
    if spec.network == "FluxTransformer2DModel" and embedded != bool(settings.get("guidance_embeds")):
        reads = f"reads a guidance scale (guidance_embeds): give {key}.guidance {{kind: embedded}}"
        has_no = f"reads no guidance scale (guidance_embeds: false), so that {key}.guidance embedded has no effect"
        raise RecipeError(f"{recipe.name}: {key}: {card.name!r} {has_no if embedded else reads}")


def _drops(recipe: Recipe) -> bool:
    return recipe.data.conditional and (recipe.data.drop_condition > 0 or recipe.data.drop_attribute > 0)


def _knows_nothing(trained: Recipe) -> bool:
    """Whether that recipe's student learned the velocity without a condition, itself or in what it starts from."""
    if _drops(trained):
        return True
    if isinstance(trained.start, FromRecipe):
        return _knows_nothing(start_recipes(trained)[0])
    if isinstance(trained.start, FromTeacher) and trained.teacher is not None:
        card = card_of(trained.teacher)
        return card.kind != "recipe" or _knows_nothing(trained.named(card.trained_by, trained.teacher.overrides))
    return False
