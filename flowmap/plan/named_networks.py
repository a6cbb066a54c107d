"""The network that a card or a recipe names, as far as it is known without weights, and whether they are here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from flowmap.base.schema import RecipeError, construct, kind_of
from flowmap.nets.dit import DiT
from flowmap.nets.mlp import MLP
from flowmap.nets.pretrained import in_hub_cache, is_hub_id, read_spec
from flowmap.nets.stacked import NetSpec, Stacked
from flowmap.nets.text_joint import TextJoint
from flowmap.nets.time_embedding import EmbedsTimeSpec
from flowmap.plan.cards import weights_folder
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.config_file import read_config
from flowmap.teachers.card import Card


def as_started(recipe: Recipe, net: StudentSpec | None) -> StudentSpec | None:
    """Return the settings of the network that the student starts from, with those that the recipe changes in it.

    Raises RecipeError if that network has no such setting.
    """
    net, start = with_time_embedding(recipe, net), recipe.start
    if not isinstance(start, FromTeacher) or net is None:
        return net
    for name, kinds, why in (
        ("arrival_blocks", (DiT,), "shows the arrival time to all of its blocks"),
        ("points", (DiT, MLP), "has one output"),
    ):
        if (value := getattr(start, name)) is None:
            continue
        if not isinstance(net, kinds):
            what = f"a network of kind {kind_of(net, TABLES)} {why}; leave it out"
            raise RecipeError(f"{recipe.name}: student.{name}: {what}")
        try:
            net = replace(net, **{name: value})
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: student.{error}") from error
    return net


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


def shipped_net(net: StudentSpec | None) -> StudentSpec | None:
    """Return the network that other runs start from: of an autoencoder trained with its flow, the flow."""
    return net.flow if isinstance(net, TextJoint) else net


def spec_of(card: Card) -> StudentSpec | None:
    """Return the settings of a pretrained card's network without its weights, or None if nothing states them.

    They are read from the weights' folder, else from the card. Raises RecipeError if the card is wrong.
    """
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
    if card.kind == "module":
        there = card.source is None or Path(card.source).is_file()
        return None if there else f"teacher.weights: {card.source}: there is no such file"
    folder = weights_folder(card)
    if (folder / "config.json").is_file():
        return None
    how = f"fetch its pickle and run `flowmap import --from FILE.pkl --out {folder}`"
    return f"{card.name!r} is the published model {card.source}: {how}"


def on_this_machine(card: Card) -> bool:
    """Return whether a diffusers model is a local folder or in the hub's cache."""
    return Path(card.source or "").is_dir() or in_hub_cache(card.pipeline, ["model_index.json"], card.revision)


def weights_of(card: Card) -> Path | None:
    """Return the file or folder of the weights of a pretrained card; None if there are none on this machine."""
    if card.kind == "diffusers":
        parts = (Path(card.pipeline) / name for name in ("transformer", "unet"))
        return next((part for part in parts if part.is_dir()), None)
    if card.kind == "module" and card.source is not None:
        return Path(card.source)
    return weights_folder(card) if card.kind == "converted" else None
