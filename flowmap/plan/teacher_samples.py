"""The shape and the classes of a teacher's samples, which a recipe has as its data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowmap.base.schema import RecipeError
from flowmap.data import TeacherSamples, Text
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.plan.named_networks import spec_of
from flowmap.student.config_file import read_config
from flowmap.teachers.card import Card

Outline = tuple[tuple[int, ...], int | None]


def samples_of(run: Any) -> TeacherSamples:
    """Return the run's data with shape and classes: its own, or those that the teacher's card or run states.

    run: plan.resolved.Resolved. Raises RecipeError if nothing states the shape, for a teacher that reads text, and for
    latents that are called pictures.
    """
    data = run.recipe.data
    assert isinstance(data, TeacherSamples)
    trained = run.teachers[0].recipe.data if run.cards[0].kind == "recipe" else None
    if _reads_text(run.cards[0], trained):
        what = "reads text, and teacher_samples have no captions; give data of kind encoded"
        raise RecipeError(f"{run.name}: data: the teacher {run.cards[0].name!r} {what}")
    found = _of_teacher(run)
    shape = tuple(data.shape) or (found and found[0])
    if not shape:
        what = "nothing states the shape of the teacher's samples; give it, such as [3, 32, 32]"
        raise RecipeError(f"{run.name}: data.shape: {what}")
    if data.pictures and (len(shape) == 3 and shape[0] > 3 if trained is None else not trained.in_pixels):
        what = f"the teacher's samples {list(shape)} are no pictures in [-1, 1]; set it to false"
        raise RecipeError(f"{run.name}: data.pictures: {what}")
    classes = found[1] if found and data.num_classes is None else data.num_classes
    return replace(data, shape=shape, num_classes=classes if data.conditional else None)


def _reads_text(card: Card, trained: Any) -> bool:
    if trained is not None:
        return trained.text is not None or isinstance(trained, Text)
    spec = spec_of(card) if card.kind == "diffusers" else None
    return isinstance(spec, DiffusersModel) and bool(set(example_conditions(spec, 1)) - {"class"})


def _of_teacher(run: Any) -> Outline | None:
    card = run.cards[0]
    if card.kind != "recipe":
        return (tuple(card.shape), card.num_classes) if card.shape else None
    trained = run.teachers[0]
    if trained.complete and trained.recipe.artifact == "student":
        config = read_config(trained.folder / "student" / "config.json")
        return tuple(config.shape), config.num_classes
    known = trained.data.outline()
    if known is not None or not trained.data.quick:
        return known
    try:
        found = trained.data.build()
    except ValueError:  # It is not on this machine; training the teacher raises the error.
        return None
    return tuple(found.shape), found.num_classes if trained.recipe.data.conditional else None
