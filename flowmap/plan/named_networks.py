"""The network that a card or a recipe names, as far as it is known without weights, and whether they are here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flowmap.base.schema import RecipeError, construct, kind_of
from flowmap.nets.pretrained import in_hub_cache, is_hub_id, read_spec
from flowmap.nets.stacked import NetSpec, Stacked
from flowmap.nets.text_joint import TextJoint
from flowmap.nets.time_embedding import EmbedsTimeSpec
from flowmap.plan.cards import card_of, teacher_cards, weights_folder
from flowmap.plan.data_folders import data_of
from flowmap.plan.dependencies import start_recipes
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.folder import read_config
from flowmap.teachers.autoencoder import Autoencoder
from flowmap.teachers.card import Card


def net_of(recipe: Recipe) -> StudentSpec | None:
    """Return the settings of the student's network, following what it starts from; None as in spec_of."""
    net: StudentSpec | None = recipe.start
    if isinstance(net, FromRecipe):
        net = _shipped(net_of(start_recipes(recipe)[0]))
    elif isinstance(net, FromTeacher):
        net = spec_of(card_of(recipe.teacher), recipe) if recipe.teacher is not None else None
    net = with_time_embedding(recipe, net)
    return stacked(net) if isinstance(recipe.student, Stacked) and net is not None else net


def with_time_embedding(recipe: Recipe, net: StudentSpec | None) -> StudentSpec | None:
    """Return the settings of the network that the student starts from, with the recipe's `time_embedding`.

    Raises RecipeError if that network's time embedding cannot be replaced.
    """
    start = recipe.start
    if not isinstance(start, (FromTeacher, FromRecipe)) or start.time_embedding is None or net is None:
        return net
    if isinstance(net, EmbedsTimeSpec):
        return net if net.embeds_t else net.embedding_t()
    what = f"a network of kind {kind_of(net, TABLES)} has no embedding of log-sigma or of 1,000 t; leave it out"
    raise RecipeError(f"{recipe.name}: student.time_embedding: {what}")


def stacked(net: StudentSpec) -> Stacked:
    """Return a stack of two of that network."""
    assert isinstance(net, NetSpec)
    return Stacked(net)


def _shipped(net: StudentSpec | None) -> StudentSpec | None:
    """Return the network that other runs start from: of an autoencoder trained with its flow, the flow."""
    return net.flow if isinstance(net, TextJoint) else net


def spec_of(card: Card, recipe: Recipe) -> StudentSpec | None:
    """Return the settings of a card's network without its weights, or None if nothing states them.

    They are read from the weights' folder, else from the recipe that trains it, else from the card. Raises
    RecipeError if the card is wrong.
    """
    if card.kind == "recipe":
        assert recipe.teacher is not None
        return _shipped(net_of(recipe.named(card.trained_by, recipe.teacher.overrides)))
    if card.kind == "diffusers" and on_this_machine(card):
        return read_spec(card.pipeline, card.revision)
    if card.kind == "converted" and missing_weights(card) is None:
        return read_config(weights_folder(card) / "config.json").net
    if not card.network:
        return None
    plain = {"kind": "diffusers", **card.network}
    for name in ("settings", "scheduler_settings"):
        if isinstance(plain.get(name), dict):
            plain[name] = json.dumps(plain[name])
    return construct(_Network, {"network": plain}, TABLES, file=f"{card.name}.yaml").network


@dataclass(frozen=True)
class _Network:
    """The slot that a card's network is read into."""

    network: StudentSpec


def missing_weights(card: Card) -> str | None:
    """Return why a pretrained card cannot be used on this machine, in one line; None if it can."""
    if card.kind == "diffusers":
        lacks = "no such folder, and no hub id (owner/name)"
        if is_hub_id(card.pipeline):
            lacks = f"not on this machine; fit fetches it{f' ({card.fetch})' if card.fetch else ''}"
        return None if on_this_machine(card) else f"{card.name!r} is the diffusers model {card.source}: {lacks}"
    folder = weights_folder(card)
    if (folder / "config.json").is_file():
        return None
    how = f"fetch its pickle and run `flowmap import --from FILE.pkl --out {folder}`"
    return f"{card.name!r} is the published model {card.source}: {how}"


def on_this_machine(card: Card) -> bool:
    """Return whether a diffusers model is a local folder or in the hub's cache."""
    return Path(card.source or "").is_dir() or in_hub_cache(card.pipeline, ["model_index.json"], card.revision)


def check_teachers(recipe: Recipe) -> None:
    """Raise RecipeError if a pretrained teacher is missing, not supported, or has other latents. Reads no weights."""
    for card in teacher_cards(recipe):
        if card.kind == "converted" and (line := missing_weights(card)):
            raise RecipeError(f"{recipe.name}: teacher.card: {line}")
        try:
            if card.kind == "diffusers":
                read_spec(card.pipeline, card.revision).check_teacher(tuple(card.shape))
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: teacher.card: {card.name!r}: {error}") from error
        if card.kind == "diffusers":
            _check_latents(recipe, card)


def _check_latents(recipe: Recipe, card: Card) -> None:
    autoencoder = data_of(recipe).autoencoder
    if isinstance(autoencoder, Autoencoder) and autoencoder.source is not None and Path(autoencoder.source).is_dir():
        try:
            autoencoder.check_channels(card.shape[0])
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: data.{error}, the first of the shape of {card.name!r}") from error
