"""Outlines of a recipe's data and teachers before any of them is here, and whether they match: shapes and classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data, build_samples
from flowmap.build.text import OnTokens
from flowmap.data import Encoded, Pairs, Text, TextCoder
from flowmap.data.outline import DataOutline, SentencesOutline, outline_of
from flowmap.data.shards import INDEX
from flowmap.data.text.dataset import Attribute
from flowmap.data.text.tokens import BPE
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.nets.text_joint import TextJoint
from flowmap.plan.cards import find_card, list_cards, teacher_cards, weights_folder
from flowmap.plan.data_folders import data_of
from flowmap.plan.dependencies import autoencoder_recipes, code_recipes, start_recipes, teacher_recipes
from flowmap.plan.named_networks import net_of
from flowmap.plan.plan import Pairing, ResolvedRun
from flowmap.plan.requirements import HasSource
from flowmap.plan.run_folders import dependency_folder, is_complete
from flowmap.recipe import Recipe
from flowmap.student.config import StudentConfig
from flowmap.student.folder import read_config
from flowmap.student.prior import auxiliary
from flowmap.teachers.autoencoder import Autoencoder

# Keys of settings that name what may be missing on this machine.
PLACE = re.compile(r"\b(root|path|source|shards|recipe|sentences|files|name|encoder|decoder)\b")

CONTEXTS = ("left", "right")  # the conditions of infilling

Shape = tuple[int, ...]


@runtime_checkable
class HasRoot(Protocol):
    """The settings of data in a folder."""

    @property
    def root(self) -> str: ...


def known_outline(recipe: Recipe, *, whole: bool = True) -> tuple[DataOutline | None, list[str]]:
    """Return the outline of the recipe's data, None if nothing determines it, and what is missing on this machine.

    The data is read if it is on this machine; otherwise settings, cards and other recipes determine the outline.
    whole: read the data even if that takes long. Raises RecipeError for a mistake in the settings.
    """
    if isinstance(recipe.data, Text):
        return _of_sentences(recipe, recipe.data)
    data, missing = None, []
    spec = recipe.data
    there = not spec.quick and isinstance(spec, HasRoot) and bool(spec.root) and Path(spec.root).exists()
    if not any(key.startswith("data") for key in recipe.missing()) and (whole or not there):
        try:
            data = build_data(recipe)
            if isinstance(recipe.coupling, Pairs) and Pairing(recipe).complete:
                build_samples(recipe, data)
        except RecipeError as error:
            missing += _lacks(recipe, error)
    return _outline(recipe) if data is None else outline_of(data), missing


def _lacks(recipe: Recipe, error: RecipeError) -> list[str]:
    """Return what the data lacks on this machine. Raise the error itself if it is about no place of data."""
    # `fit` encodes the data in a stage of its own.
    if isinstance(recipe.data, Encoded) and not (Path(data_of(recipe).root) / INDEX).is_file():
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


def _outline(recipe: Recipe) -> DataOutline | None:
    """Return the outline of data that is not here, as settings, recipes and cards state it; None if they do not."""
    spec = net_of(recipe)
    shape, num_classes = recipe.data.outline() or (_codes(recipe) or _latents(recipe), None)
    carded = _carded(recipe) or (None, None)
    shape, num_classes = shape or carded[0], num_classes or carded[1]
    if not shape or spec is None:
        return None
    net = net_within(spec)
    conditions = example_conditions(net, 1) if isinstance(net, DiffusersModel) else {}
    return DataOutline(shape, num_classes, conditions=conditions)


def _of_sentences(recipe: Recipe, spec: Text) -> tuple[DataOutline, list[str]]:
    """Return the outline of sentences, of which at most the attributes are read, and what is missing."""
    missing = list[str]()
    tokenizer = spec.tokenizer or BPE()
    shape: Shape = (tokenizer.row_length,)
    attributes: tuple[Attribute, ...] = ()
    try:
        if spec.autoencoder is not None:
            shape = _text_latents(recipe, spec.autoencoder)
        attributes = spec.read()[2] if "???" not in repr(spec.sentences) else ()
    except ValueError as error:
        missing.append(str(error))
    tokens = None
    if spec.autoencoder is None:
        try:
            tokens = tokenizer.outline()
        except ValueError as error:
            missing.append(str(error))
            tokens = tokenizer.assumed_outline()
    contexts = {name: torch.zeros(1, *shape) for name in CONTEXTS if spec.infill}
    numbers = {name: torch.zeros(1, dtype=torch.int64) for name in spec.attributes}
    sentences = SentencesOutline(attributes, tuple(contexts), tokens)
    return DataOutline(shape, conditions={**contexts, **numbers}, sentences=sentences), missing


def _text_latents(recipe: Recipe, autoencoder: TextCoder) -> Shape:
    for trained in autoencoder_recipes(recipe):
        assert isinstance(trained.student, OnTokens)
        return trained.student.latent_shape
    return autoencoder.load().shape


def _codes(recipe: Recipe) -> Shape | None:
    """Return the shape of codes, if they are the data."""
    return next(((auxiliary(trained.student).size,) for trained in code_recipes(recipe)), None)


def _carded(recipe: Recipe) -> tuple[Shape, int | None] | None:
    """Return shape and classes of samples as the teacher's card states them.

    Without one, those of the recipe that trains the teacher or what the student starts from.
    """
    cards = teacher_cards(recipe)
    if cards and cards[0].shape:
        return tuple(cards[0].shape), cards[0].num_classes
    return next(
        (found for needed in (*teacher_recipes(recipe), *start_recipes(recipe)) if (found := _carded(needed))), None
    )


def _latents(recipe: Recipe) -> Shape | None:
    """Return the shape of latents of an autoencoder, or None.

    It is known of one that a recipe trains, that a card of kind autoencoder describes, or that is a local folder.
    """
    images, autoencoder = recipe.data.images, recipe.data.autoencoder
    for trained in autoencoder_recipes(recipe) if images is not None else ():
        spec: Any = trained.student  # the settings of an autoencoder
        side = halved(recipe, 2 ** (len(spec.channels) - 1), trained.name)
        return spec.latent_channels, side, side
    source = autoencoder.source if isinstance(autoencoder, HasSource) else None
    for card in map(find_card, list_cards()) if source else ():
        if card.kind == "autoencoder" and card.source == source:
            assert card.pixels is not None  # read_card has checked this.
            side = halved(recipe, card.pixels // card.shape[1], card.name)
            return card.shape[0], side, side
    if isinstance(autoencoder, Autoencoder) and images is not None and source and Path(source).is_dir():
        outline = autoencoder.outline()
        return outline and (outline[0], *2 * (halved(recipe, outline[1], source),))
    return None


def halved(recipe: Recipe, factor: int, autoencoder: str) -> int:
    """Return the side of the latents of the recipe's pictures. Raise RecipeError if `factor` does not divide theirs."""
    data: Any = recipe.data  # of pictures
    size = data.images.size
    if size % factor:
        what = f"{size} is not a multiple of {factor}, the side of one latent of {autoencoder!r}"
        raise RecipeError(f"{recipe.name}: data.images.size: {what}")
    return size // factor


def check_outlines(run: ResolvedRun, config: StudentConfig) -> None:
    """Raise RecipeError unless every teacher, and what the student starts from, has the data's shape and classes."""
    recipe = run.recipe
    if recipe.data.images is not None:
        _latents(recipe)
    for name, known in _others(run):
        if tuple(config.shape) not in [tuple(shape) for shape, _ in known]:
            raise RecipeError(
                f"{recipe.name}: data: its samples are {tuple(config.shape)}, those of {name} {tuple(known[0][0])}"
            )
        classes = [num for _, num in known]
        if config.num_classes and all(classes) and config.num_classes not in classes:
            raise RecipeError(f"{recipe.name}: data: has {config.num_classes} classes, {name} {classes[0]}")


def _others(run: ResolvedRun) -> Iterator[tuple[str, list[tuple[Shape, int | None]]]]:
    """Yield the name of every teacher and of what the student starts from, with shapes and classes.

    For a converted network both its weights and its card state them; where they differ, the data may match either.
    """
    for card in (*run.cards, *run.pairs_cards):
        known = [(tuple(card.shape), card.num_classes)] if card.kind != "recipe" and card.shape else []
        config = weights_folder(card) / "config.json"
        if card.kind == "converted" and config.is_file():
            converted = read_config(config)
            known.insert(0, (converted.shape, converted.num_classes))
        if known:
            yield f"the teacher {card.name}", known
    for role, trained in (
        *(("the teacher", one) for one in (*run.teachers, *run.pairs_teachers)),
        *(("the start", one) for one in run.starts),
    ):
        found = _of_student(trained)
        if found is not None:
            yield f"{role} {trained.name}", [found]


def _of_student(trained: Recipe) -> tuple[Shape, int | None] | None:
    """Return shape and classes of that recipe's student: from its configuration if trained, else from its data."""
    folder = dependency_folder(trained)
    if is_complete(folder, trained) and trained.artifact == "student":
        config = read_config(folder / "student" / "config.json")
        return config.shape, config.num_classes
    if isinstance(trained.student, TextJoint):  # Its flow is in the latents of its own autoencoder.
        return trained.student.latent_shape, None
    known = trained.data.outline()
    if known is None or known[1] is None:  # The settings do not state it, so the data is read.
        data, _ = known_outline(trained)
        known = None if data is None else (data.shape, data.num_classes)
    return known and (known[0], known[1] if trained.data.conditional else None)
