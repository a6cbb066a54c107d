"""Check that guidance has what it needs: conditions in the data, and a teacher trained without a condition too."""

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
from flowmap.plan.named_networks import spec_of
from flowmap.plan.resolved import Resolved
from flowmap.recipe import Recipe
from flowmap.recipe.module_teacher import ModuleTeacher
from flowmap.recipe.settings import ClassifierFree, Embedded, FromRecipe, FromTeacher
from flowmap.teachers.card import Card

# networks with a setting guidance_embeds, and what it is where it is not set
READ_SCALES = {"FluxTransformer2DModel": False, "Flux2Transformer2DModel": True}


def check_guidance(run: Resolved) -> None:
    """Raise RecipeError if a guidance has no effect, or needs a velocity without a condition that was never learned."""
    recipe = run.recipe
    slots = (("teacher", recipe.teacher, run.cards), ("coupling.teacher", pairs_teacher(recipe), run.pairs_cards))
    for key, slot, cards in slots:
        if slot is not None:
            _check_slot(run, key, slot, cards[0])
    if abs(recipe.distillation.null_weight) > 1e-9 and not _drops(recipe):
        raise RecipeError(
            f"{recipe.name}: objective.omega: guidance in the target asks the student without a condition, which it "
            "never learns: data.drop_condition is 0; set it to 0.1, for example"
        )


def check_conditions(recipe: Recipe, data: DataOutline) -> None:
    """Raise RecipeError if classifier-free guidance is configured for data that has neither classes nor text, or with
    patches that do not divide the samples.
    """
    for key, slot in _slots(recipe):
        patch = slot.guidance.rescale_patch if isinstance(slot.guidance, ClassifierFree) else None
        if patch and (len(data.shape) != 3 or data.shape[-2] % patch or data.shape[-1] % patch):
            raise RecipeError(
                f"{recipe.name}: {key}.guidance.rescale_patch: patches of {patch} x {patch} do not divide samples of "
                f"shape {tuple(data.shape)}"
            )
    if data.num_classes or set(data.conditions) - {"class", "z"}:
        return
    for key, slot in _slots(recipe):
        if isinstance(slot.guidance, ClassifierFree):
            raise RecipeError(_no_conditions(recipe, key))


def _no_conditions(recipe: Recipe, key: str) -> str:
    no_effect = f"{recipe.name}: {key}.guidance: classifier_free has no effect"
    return f"{no_effect}: the data has neither classes nor text; leave it out"


def _known_to_have_none(data: Any) -> bool:
    """Return whether the settings, or the names in the folder, show that there are neither classes nor text."""
    if isinstance(data, Tensors):
        return not data.num_classes
    is_folder = isinstance(data, Folder)
    images = FolderImages(data.size, data.channels, data.root, captions=False) if is_folder else data.images
    try:
        return isinstance(images, FolderImages) and data.text is None and images.num_classes() is None
    except ValueError:  # There is no such folder: building the data fails with that message.
        return False


def guidance_warnings(recipe: Recipe) -> list[str]:
    """Return a warning for each guidance whose network may never have learned the velocity without a condition."""
    return [
        f"{key}.guidance: classifier_free asks {card.name!r} without a class; as far as is known, NVIDIA's published "
        "class-conditional networks were always trained with one: check the teacher's samples, or use autoguidance"
        for key, slot in _slots(recipe)
        if isinstance(slot.guidance, ClassifierFree) and (card := card_of(slot)).kind == "converted"
    ]


def _slots(recipe: Recipe) -> Iterator[tuple[str, TeacherSlot]]:
    slots = (("teacher", recipe.teacher), ("coupling.teacher", pairs_teacher(recipe)))
    return ((key, slot) for key, slot in slots if slot is not None)


def _check_slot(run: Resolved, key: str, slot: TeacherSlot, card: Card) -> None:
    recipe, free = run.recipe, isinstance(slot.guidance, ClassifierFree)
    if free and not recipe.data.conditional:
        raise RecipeError(
            f"{recipe.name}: {key}.guidance: classifier_free has no effect: data.conditional is false; "
            "leave one of them out"
        )
    if free and _known_to_have_none(recipe.data):
        raise RecipeError(_no_conditions(recipe, key))
    asks = f"{key}.guidance: classifier_free asks" if free else None
    if not free and _drops(recipe):
        asks = "data.drop_condition: above 0 asks"
    if asks and card.kind == "recipe":
        taught = run.of(recipe.named(card.trained_by, slot.overrides))
        trained = taught.recipe
        if trained.data.conditional and recipe.data.conditional and not _learns_unconditional(taught):
            raise RecipeError(
                f"{recipe.name}: {asks} the teacher without a condition, and {trained.name!r} never learned that: "
                "its data.drop_condition is 0; train it with 0.1, for example"
            )
    if asks and isinstance(slot, ModuleTeacher) and slot.classes and slot.null_class is None:
        raise RecipeError(
            f"{recipe.name}: {key}.null_class: {asks} the module without a class; name its label for none"
        )
    if card.kind == "diffusers":
        _check_pretrained(recipe, key, slot, card, asks)


def _check_pretrained(recipe: Recipe, key: str, slot: TeacherSlot, card: Card, asks: str | None) -> None:
    spec = spec_of(card)
    if not isinstance(spec, DiffusersModel):
        return
    settings, embedded = json.loads(spec.settings), isinstance(slot.guidance, Embedded)
    labelled = settings.get("num_class_embeds") is not None or settings.get("class_embed_type") is not None
    if asks and spec.network == "UNet2DModel" and labelled:
        raise RecipeError(
            f"{recipe.name}: {asks} {card.name!r} without a class, and a UNet2DModel has no label for none"
        )
    own = settings.get("guidance_embeds", READ_SCALES.get(spec.network, False))
    if spec.network in READ_SCALES and embedded != bool(own):
        reads = f"reads a guidance scale (guidance_embeds): give {key}.guidance {{kind: embedded}}"
        has_no = f"reads no guidance scale (guidance_embeds: false), so that {key}.guidance embedded has no effect"
        raise RecipeError(f"{recipe.name}: {key}: {card.name!r} {has_no if embedded else reads}")


def _drops(recipe: Recipe) -> bool:
    return recipe.data.conditional and (recipe.data.drop_condition > 0 or recipe.data.drop_attribute > 0)


def _learns_unconditional(run: Resolved) -> bool:
    """Return whether that run's student, or what it starts from, learned the velocity without a condition."""
    trained = run.recipe
    if _drops(trained):
        return True
    if isinstance(trained.start, FromRecipe):
        return _learns_unconditional(run.starts[0])
    if isinstance(trained.start, FromTeacher) and trained.teacher is not None:
        card = run.cards[0]
        return card.kind != "recipe" or _learns_unconditional(run.trainer_of(card))
    return False
