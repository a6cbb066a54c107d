"""What pairs on disk were made of, as plain values that another machine would find equal: teacher and weights, guidance, solver, data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from flowmap.base.files import weights_hash
from flowmap.base.schema import RecipeError, to_plain
from flowmap.data import Encoded, Folder, Pairs
from flowmap.data.dataset import Source
from flowmap.data.pairs import CLOCK, FORMAT
from flowmap.data.sources import READER
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.settings import Autoguidance
from flowmap.teachers.card import Card

WHERE = (
    "root",
    *(field.name for field in fields(Source) if field.name != "conditional"),
)  # of data: what no pair depends on


def pairs_spec(recipe: Recipe) -> Pairs:
    """The recipe's coupling, which must be pairs."""
    assert isinstance(recipe.coupling, Pairs)
    return recipe.coupling


def scale_of(recipe: Recipe) -> float | None:
    """The one guidance scale that the pairs are made with; None where their teacher has no guidance."""
    spec = pairs_spec(recipe)
    if spec.teacher is not None:
        guidance = spec.teacher.guidance
    else:
        assert spec.recipe is not None  # Pairs has checked
        trained = recipe.named(spec.recipe)
        guidance = trained.teacher.guidance if trained.teacher is not None else None
        if guidance is None and spec.guidance is not None:
            raise RecipeError(
                f"{recipe.name}: coupling.guidance: {spec.guidance} was given, but {spec.recipe!r} takes no guidance"
            )
    if guidance is None:
        return None
    return guidance.default if spec.guidance is None else spec.guidance


def baked_scale(recipe: Recipe) -> float | None:
    """The guidance scale that the recipe's pairs have in them: of what made them, or of the pairs that that in turn learned from."""
    if not isinstance(recipe.coupling, Pairs):
        return None
    spec = recipe.coupling
    made_by = spec.recipe if spec.teacher is None else spec.teacher.recipe
    scale = scale_of(recipe)
    return baked_scale(recipe.named(made_by)) if scale is None and made_by is not None else scale


def identity(
    recipe: Recipe,
    data: Any,
    card_of: Callable[[Any], Card],
    find_card: Callable[[str], Card],
    weights_of: Callable[..., Path | None],
) -> dict[str, Any]:
    """Everything that the recipe's pairs depend on, as JSON would give it back; weights are None where they are not on this machine.

    data: the recipe's, its folders filled in. card_of(teacher slot) and find_card(name) give cards; weights_of(card or recipe) the folder or
    file with those weights.
    """
    spec = pairs_spec(recipe)
    if spec.recipe is None:
        made_by = _of_card(recipe, card_of, find_card, weights_of)
    else:
        made_by = _of_recipe(recipe.named(spec.recipe), weights_of)
    found = {
        "format": FORMAT,
        "clock": CLOCK,
        "teacher": made_by,
        "guidance": scale_of(recipe),
        "solver": to_plain(spec.solver, TABLES),
        **{name: getattr(spec, name) for name in ("num", "inverted", "seed", "dtype")},
        "data": _of_data(recipe, data),
    }
    if isinstance(recipe.prior, Learned):
        found["prior"] = _of_prior(recipe, recipe.prior, weights_of)
    return json.loads(json.dumps(found))


def _of_prior(recipe: Recipe, prior: Learned, weights_of) -> dict[str, Any]:
    """Without what does not change where pairs start: whether a network is told of it."""
    flow, codes = {}, None
    if isinstance(prior.z, FlowCodes):
        flow = {"flow": _of_recipe(recipe.named(prior.z.recipe, prior.z.overrides), weights_of), "steps": prior.z.steps}
    else:
        codes = prior.z
    found = _of_recipe(recipe.named(prior.recipe, prior.overrides), weights_of)
    return {**found, "scale": prior.scale, "z": to_plain(codes, TABLES), **flow}


def _of_recipe(trained: Recipe, weights_of) -> dict[str, Any]:
    return {"recipe": trained.name, "hash": trained.hash(), "weights": weights_hash(weights_of(trained))}


def _of_card(recipe: Recipe, card_of, find_card, weights_of) -> dict[str, Any]:
    teacher = pairs_spec(recipe).teacher
    assert teacher is not None
    guidance = teacher.guidance
    found = _card(recipe, card_of(teacher), weights_of)
    if guidance is not None:
        plain = to_plain(guidance, TABLES)
        found["guidance"] = {key: value for key, value in plain.items() if key not in ("scale", "default")}
    if isinstance(guidance, Autoguidance) and guidance.weak is not None:
        found["weak"] = _card(recipe, find_card(guidance.weak), weights_of)
    return found


def _card(recipe: Recipe, card: Card, weights_of) -> dict[str, Any]:
    here = card.source is not None and Path(card.source).is_dir()  # then its weights name it, not where they lie
    found = {"card": card.name, "kind": card.kind, "source": None if here else card.source, "revision": card.revision}
    teacher = pairs_spec(recipe).teacher
    assert teacher is not None
    trained = recipe.named(card.trained_by, teacher.overrides) if card.kind == "recipe" else None
    found |= {"recipe": None if trained is None else trained.name, "hash": None if trained is None else trained.hash()}
    folder = weights_of(trained or card)
    return {key: value for key, value in found.items() if value is not None} | {"weights": weights_hash(folder)}


def _of_data(recipe: Recipe, data: Any) -> dict[str, Any]:
    if isinstance(data, Encoded):
        return {"kind": "encoded", "conditional": data.conditional, **data.identity(), **data.chosen()}
    found = {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in WHERE}
    return found | ({"reader": READER} if isinstance(data, Folder) else {})
