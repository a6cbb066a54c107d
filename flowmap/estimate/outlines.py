"""What is known of a recipe's data and of its teachers before any is there, and whether they fit each other: shapes, classes, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmap.base.schema import RecipeError
from flowmap.build.parts import build_data, build_samples
from flowmap.data import Dataset, Encoded, Pairs, Text
from flowmap.data.shards import INDEX
from flowmap.estimate.text import described
from flowmap.flow.types import Cond
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.nets.text_joint import TextJoint
from flowmap.plan.cards import find_card, list_cards, pairs_cards, teacher_cards, weights_folder
from flowmap.plan.data_folders import data_of
from flowmap.plan.dependencies import autoencoder_recipes, code_recipes, pairs_recipes, start_recipes, teacher_recipes
from flowmap.plan.named_networks import net_of
from flowmap.plan.plan import Pairing
from flowmap.plan.run_folders import dependency_folder, is_complete
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import StudentSpec
from flowmap.student.config import StudentConfig
from flowmap.student.folder import read_config
from flowmap.student.prior import auxiliary
from flowmap.teachers.autoencoder import Autoencoder

PLACE = re.compile(
    r"\b(root|path|source|shards|recipe|sentences|files|name|encoder|decoder)\b"
)  # keys that name what may not be here

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Described:
    """What is known of a data set that is not here: as much of data/dataset.py's Dataset as a student's configuration asks for."""

    shape: Shape
    num_classes: int | None
    spec: StudentSpec
    class_names: tuple[str, ...] | None = None

    def conditions_at(self, places: Tensor) -> Cond:
        net = net_within(self.spec)
        return example_conditions(net, len(places)) if isinstance(net, DiffusersModel) else {}


def known_data(recipe: Recipe, *, whole: bool = True) -> tuple[Dataset | Described | None, list[str]]:
    """The recipe's data itself where it is here, else what is known of it, and what is missing. RecipeError for a mistake in its settings.

    whole: also data that takes long to read.
    """
    data, missing = None, []
    if isinstance(recipe.data, Text):
        return described(recipe)
    there = not recipe.data.quick and any(
        Path(place).exists() for name in ("root", "path") if (place := getattr(recipe.data, name, ""))
    )
    if not any(key.startswith("data") for key in recipe.missing()) and (whole or not there):
        try:
            data = build_data(recipe)
            if isinstance(recipe.coupling, Pairs) and Pairing(recipe).complete:
                build_samples(recipe, data)
        except RecipeError as error:
            missing += _lacks(recipe, error)
    return _described(recipe) if data is None else data, missing


def _lacks(recipe: Recipe, error: RecipeError) -> list[str]:
    """What the data lacks on this machine; the error itself where it is no place that has nothing."""
    if (
        isinstance(recipe.data, Encoded) and not (Path(data_of(recipe).root) / INDEX).is_file()
    ):  # `fit` makes them, as a stage of their own
        try:
            recipe.data.images.length()
            return []
        except ValueError as lacks:
            return [str(lacks).replace("data.root", "data.images.root")]
    if code_recipes(recipe):
        return []
    known = str(error).removeprefix(f"{recipe.name}: ")
    if not PLACE.search(known.split(":")[0]):
        raise error
    return [known]


def _described(recipe: Recipe) -> Described | None:
    spec = net_of(recipe)
    shape, num_classes = recipe.data.outline() or (_codes(recipe) or _latents(recipe), None)
    carded = _carded(recipe) or (None, None)
    shape, num_classes = shape or carded[0], num_classes or carded[1]
    return Described(shape, num_classes, spec) if shape and spec is not None else None


def _codes(recipe: Recipe) -> Shape | None:
    """The shape of codes, where they are the data."""
    return next(((auxiliary(trained.student).size,) for trained in code_recipes(recipe)), None)


def _carded(recipe: Recipe) -> tuple[Shape, int | None] | None:
    """(shape, classes) of the samples as the teacher's card says them, or that of the recipe that it or the student comes from."""
    cards = teacher_cards(recipe)
    if cards and cards[0].shape:
        return tuple(cards[0].shape), cards[0].num_classes
    return next(
        (found for needed in (*teacher_recipes(recipe), *start_recipes(recipe)) if (found := _carded(needed))), None
    )


def _latents(recipe: Recipe) -> Shape | None:
    """The shape of latents of an autoencoder that one of our recipes trains, that a card of kind autoencoder describes, or that is here."""
    images, autoencoder = getattr(recipe.data, "images", None), getattr(recipe.data, "autoencoder", None)
    for trained in autoencoder_recipes(recipe) if images is not None else ():
        spec: Any = trained.student  # of an autoencoder
        side = halved(recipe, 2 ** (len(spec.channels) - 1), trained.name)
        return spec.latent_channels, side, side
    source = getattr(autoencoder, "source", None)
    for card in map(find_card, list_cards()) if source else ():
        if card.kind == "autoencoder" and card.source == source:
            assert card.pixels is not None  # read_card has checked
            side = halved(recipe, card.pixels // card.shape[1], card.name)
            return card.shape[0], side, side
    if isinstance(autoencoder, Autoencoder) and images is not None and source and Path(source).is_dir():
        outline = autoencoder.outline()
        return outline and (outline[0], *2 * (halved(recipe, outline[1], source),))
    return None


def halved(recipe: Recipe, factor: int, autoencoder: str) -> int:
    """The side of the latents of the recipe's pictures. RecipeError where `factor` pixels a side do not divide them."""
    data: Any = recipe.data  # of pictures
    size = data.images.size
    if size % factor:
        raise RecipeError(
            f"{recipe.name}: data.images.size: {size} is not a multiple of {factor}, the side of one latent of {autoencoder!r}"
        )
    return size // factor


def check_outlines(recipe: Recipe, config: StudentConfig) -> None:
    """RecipeError unless the samples of every teacher, and of the student that this one starts from, have its shape and its classes."""
    if getattr(recipe.data, "images", None) is not None:
        _latents(recipe)
    for whose, known in _others(recipe):
        if tuple(config.shape) not in [tuple(shape) for shape, _ in known]:
            raise RecipeError(
                f"{recipe.name}: data: its samples are {tuple(config.shape)}, those of {whose} {tuple(known[0][0])}"
            )
        classes = [num for _, num in known]
        if config.num_classes and all(classes) and config.num_classes not in classes:
            raise RecipeError(f"{recipe.name}: data: has {config.num_classes} classes, {whose} {classes[0]}")


def _others(recipe: Recipe) -> Iterator[tuple[str, list[tuple[Shape, int | None]]]]:
    """(name, what is told of the shape of its samples and of its classes) of every teacher and of the student that this one starts from.

    Of a network of others both its converted weights and its card tell; where they differ, either may be what the data is like.
    """
    for card in (*teacher_cards(recipe), *pairs_cards(recipe)):
        known = [(tuple(card.shape), card.num_classes)] if card.kind != "recipe" and card.shape else []
        config = weights_folder(card) / "config.json"
        if card.kind == "converted" and config.is_file():
            found = read_config(config)
            known.insert(0, (found.shape, found.num_classes))
        if known:
            yield f"the teacher {card.name}", known
    made_by = pairs_recipes(recipe) if isinstance(recipe.coupling, Pairs) else []
    for whose, trained in (
        *(("the teacher", one) for one in (*teacher_recipes(recipe), *made_by)),
        *(("the start", one) for one in start_recipes(recipe)),
    ):
        found = _outline(trained)
        if found is not None:
            yield f"{whose} {trained.name}", [(found.shape, found.num_classes)]


def _outline(trained: Recipe) -> Any:
    """What has the shape and the classes of that recipe's student: its own configuration where it is trained, else its data."""
    folder = dependency_folder(trained)
    if is_complete(folder, trained) and trained.artifact == "student":
        return read_config(folder / "student" / "config.json")
    if isinstance(trained.student, TextJoint):  # its flow is in the latents of its own autoencoder
        return Described(trained.student.latent_shape, None, trained.student.flow)
    known = trained.data.outline()
    if known is not None and known[1] is not None:  # the settings say it: the data need not be read
        return Described(known[0], known[1] if trained.data.conditional else None, trained.student)
    data, _ = known_data(trained)
    return data if data is None or trained.data.conditional else Described(data.shape, None, trained.student)
