"""What can be told of a recipe before anything is trained or encoded: whether its parts fit, and what of them is not on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmap.base.schema import RecipeError
from flowmap.data import Dataset, Pairs
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.metrics import check_metrics, lacking
from flowmap.nets.pretrained import in_hub_cache, is_hub_id
from flowmap.plan.cards import teacher_cards
from flowmap.plan.data_folders import data_of
from flowmap.plan.dependencies import code_recipes, pairs_recipes, prior_recipes, teacher_recipes
from flowmap.plan.frozen_parts import check_frozen_parts
from flowmap.plan.guidance import check_guidance
from flowmap.plan.named_networks import check_teachers
from flowmap.recipe import Recipe
from flowmap.recipe.settings import FromTeacher
from flowmap.student.prior import Shipped, auxiliary
from flowmap.teachers.text import MINILM_SOURCE


def check_beforehand(recipe: Recipe) -> None:
    """RecipeError where its teacher, its prior or its metrics cannot be had here or do not fit; no weights are read."""
    check_parts(recipe)
    if lacks := lacking(recipe.metrics):
        raise RecipeError(f"{recipe.name}: {lacks[0]}")
    if recipe.data.quick:
        try:
            data = data_of(recipe).build()
        except ValueError:
            return  # it is made by a stage, or said when it is built
        check_sizes(recipe, data)


def check_sizes(recipe: Recipe, data: Dataset) -> None:
    """RecipeError where one of its metrics does not fit the data: too few samples for its settings, no classes, nothing held out."""
    seen = {
        "student": recipe.metrics,
        "text_joint": recipe.metrics,
        "autoencoder": [m for m in recipe.metrics if m.on_samples],
    }
    try:
        check_metrics(
            seen.get(recipe.artifact, ()),
            data,
            conditional=recipe.data.conditional,
            paired=isinstance(recipe.coupling, Pairs),
        )
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error


def check_parts(recipe: Recipe) -> None:
    """RecipeError where student, teacher and prior do not fit each other."""
    if isinstance(recipe.start, FromTeacher) and recipe.teacher is None:
        raise RecipeError(
            f"{recipe.name}: student.kind: from_teacher needs a teacher that is a network; without one name a network (dit, mlp, ...)"
        )
    check_teachers(recipe)
    check_guidance(recipe)
    check_prior(recipe)
    try:
        check_frozen_parts(recipe.data)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: data.{error}") from error


def missing_parts(recipe: Recipe) -> list[str]:
    """What its metrics and the frozen networks of its data need that is not on this machine, a line each."""
    parts = [(f"data.{name}.source", getattr(recipe.data, name, None)) for name in ("autoencoder", "text")]
    return [*lacking(recipe.metrics), *(line for key, part in parts if (line := _missing_source(key, part)))]


def _missing_source(key: str, part: Any) -> str | None:
    source = getattr(part, "source", None)
    if source in (None, MINILM_SOURCE) or Path(source).is_dir():
        return None
    if not is_hub_id(source):
        return f"{key}: {source!r}: no such folder, and no hub id (owner/name)"
    here = in_hub_cache(source, ("config.json", "vae/config.json", "model_index.json"), part.revision)
    return None if here else f"{key}: {source!r}: not on this machine; fit fetches it"


def shipped_prior(recipe: Recipe) -> Shipped | None:
    """What the recipe's student says of its learned prior, known before any is trained; None for the Gaussian one."""
    if not isinstance(recipe.prior, Learned):
        return None
    trained = prior_recipes(recipe)[0]
    if trained.artifact != "prior":
        raise RecipeError(
            f"{recipe.name}: prior.recipe: {trained.name!r} trains no auxiliary model: its objective is not variance_guided"
        )
    return Shipped(
        auxiliary(trained.student).size, recipe.prior.scale, recipe.prior.conditioning, trained.name, trained.hash()
    )


def check_prior(recipe: Recipe) -> None:
    """RecipeError where the flow of codes is one of other codes than the encoder's, or the teacher's paths start at another prior."""
    ours = shipped_prior(recipe)
    if isinstance(recipe.prior, Learned) and isinstance(recipe.prior.z, FlowCodes):
        _check_codes(recipe)
    trained = [*teacher_recipes(recipe), *(pairs_recipes(recipe) if isinstance(recipe.coupling, Pairs) else [])]
    for teacher in trained:
        check_start(recipe, shipped_prior(teacher), ours)
    if ours is not None and not trained and teacher_cards(recipe):
        check_start(recipe, None, ours)


def _check_codes(recipe: Recipe) -> None:
    trained, flow = prior_recipes(recipe)
    of = code_recipes(flow)
    if not of or of[0].hash() != trained.hash():
        what = f"the codes of {of[0].name!r} ({of[0].hash()})" if of else "no codes (data of kind codes)"
        raise RecipeError(
            f"{recipe.name}: prior.z.recipe: {flow.name!r} does not match the encoder: it is trained on {what}, "
            f"not on those of {trained.name!r} ({trained.hash()}); what prior.overrides changes, prior.z.overrides must say too, "
            'as ["data.overrides=[...]"]'
        )


def check_start(recipe: Recipe, theirs: Shipped | None, ours: Shipped | None) -> None:
    """RecipeError unless the teacher's paths start where the recipe's do."""
    if (ours is None) != (theirs is None) or (ours is not None and not ours.same_start(theirs)):
        raise RecipeError(
            f"{recipe.name}: prior: the teacher's paths start at {theirs or 'N(0, I)'}, the recipe's at {ours or 'N(0, I)'}"
        )
