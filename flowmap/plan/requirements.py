"""Checks of a recipe before anything is trained or encoded: whether its parts match, and what is missing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class HasSource(Protocol):
    """A frozen network named by a folder or a hub id."""

    @property
    def source(self) -> str | None: ...


@runtime_checkable
class HasRevision(Protocol):
    """A frozen network with a revision on the hub."""

    @property
    def revision(self) -> str | None: ...


def check_beforehand(recipe: Recipe) -> None:
    """Raise RecipeError if teacher, prior or metrics are not available here or do not match. Reads no weights."""
    check_parts(recipe)
    if lacks := lacking(recipe.metrics):
        raise RecipeError(f"{recipe.name}: {lacks[0]}")
    if recipe.data.quick:
        try:
            data = data_of(recipe).build()
        except ValueError:
            return  # A stage makes the data, or building it raises the error.
        check_sizes(recipe, data)


def check_sizes(recipe: Recipe, data: Dataset) -> None:
    """Raise RecipeError if the data does not suffice for a metric: too few samples, no classes, nothing held out."""
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
    """Raise RecipeError if student, teacher and prior do not match each other."""
    if isinstance(recipe.start, FromTeacher) and recipe.teacher is None:
        raise RecipeError(
            f"{recipe.name}: student.kind: from_teacher needs a teacher that is a network; without one name a network "
            "(dit, mlp, ...)"
        )
    check_teachers(recipe)
    check_guidance(recipe)
    check_prior(recipe)
    try:
        check_frozen_parts(recipe.data)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: data.{error}") from error


def missing_parts(recipe: Recipe) -> list[str]:
    """Return what metrics and frozen networks of the data need that is not on this machine, a line each."""
    parts = (("data.autoencoder.source", recipe.data.autoencoder), ("data.text.source", recipe.data.text))
    return [*lacking(recipe.metrics), *(line for key, part in parts if (line := _missing_source(key, part)))]


def _missing_source(key: str, part: Any) -> str | None:
    source = part.source if isinstance(part, HasSource) else None
    if source in (None, MINILM_SOURCE) or Path(source).is_dir():
        return None
    if not is_hub_id(source):
        return f"{key}: {source!r}: no such folder, and no hub id (owner/name)"
    revision = part.revision if isinstance(part, HasRevision) else None
    here = in_hub_cache(source, ("config.json", "vae/config.json", "model_index.json"), revision)
    return None if here else f"{key}: {source!r}: not on this machine; fit fetches it"


def shipped_prior(recipe: Recipe) -> Shipped | None:
    """Return how the student records its learned prior, known before that is trained; None for the Gaussian prior."""
    if not isinstance(recipe.prior, Learned):
        return None
    trained = prior_recipes(recipe)[0]
    if trained.artifact != "prior":
        raise RecipeError(
            f"{recipe.name}: prior.recipe: {trained.name!r} trains no auxiliary model: "
            "its objective is not variance_guided"
        )
    return Shipped(
        auxiliary(trained.student).size, recipe.prior.scale, recipe.prior.conditioning, trained.name, trained.hash()
    )


def check_prior(recipe: Recipe) -> None:
    """Raise RecipeError if the flow of codes belongs to another encoder, or the teacher's paths start at another
    prior.
    """
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
            f"not on those of {trained.name!r} ({trained.hash()}); what prior.overrides changes, "
            'prior.z.overrides must change too, as ["data.overrides=[...]"]'
        )


def check_start(recipe: Recipe, theirs: Shipped | None, ours: Shipped | None) -> None:
    """Raise RecipeError unless the teacher's paths start where the recipe's do."""
    if (ours is None) != (theirs is None) or (ours is not None and not ours.same_start(theirs)):
        starts = f"the teacher's paths start at {theirs or 'N(0, I)'}, the recipe's at {ours or 'N(0, I)'}"
        raise RecipeError(f"{recipe.name}: prior: {starts}")
