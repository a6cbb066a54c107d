"""Checks of a recipe before anything is trained or encoded: whether its parts match, and what is missing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flowmap.base.schema import RecipeError
from flowmap.data import Dataset, Pairs
from flowmap.data.prompts import read_prompts
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.metrics import check_metrics, lacking
from flowmap.nets.lora_file import check_lora
from flowmap.nets.pretrained import in_hub_cache, is_hub_id, read_spec
from flowmap.nets.quantized import check_available
from flowmap.plan.cards import pairs_teacher
from flowmap.plan.frozen_parts import check_frozen_parts
from flowmap.plan.guidance import check_guidance
from flowmap.plan.named_networks import missing_weights
from flowmap.plan.resolved import Resolved
from flowmap.recipe import Recipe
from flowmap.recipe.settings import FromTeacher
from flowmap.student.prior import Shipped
from flowmap.teachers.autoencoder import Autoencoder
from flowmap.teachers.card import Card
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


def check_beforehand(run: Resolved) -> None:
    """Raise RecipeError if teacher, prior or metrics are not available here or do not match. Reads no weights."""
    recipe = run.recipe
    check_parts(run)
    if lacks := [*lacking(recipe.metrics), *_missing_captions(recipe)]:
        raise RecipeError(f"{recipe.name}: {lacks[0]}")
    if recipe.data.quick:
        try:
            data = run.data.build()
        except ValueError:
            return  # A stage makes the data, or building it raises the error.
        check_sizes(run, data)


def check_sizes(run: Resolved, data: Dataset) -> None:
    """Raise RecipeError if the data does not suffice for a metric: too few samples, no classes, nothing held out."""
    recipe = run.recipe
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


def check_parts(run: Resolved) -> None:
    """Raise RecipeError if student, teacher and prior do not match each other."""
    recipe = run.recipe
    if isinstance(recipe.start, FromTeacher) and recipe.teacher is None:
        raise RecipeError(
            f"{recipe.name}: student.kind: from_teacher needs a teacher that is a network; without one name a network "
            "(dit, mlp, ...)"
        )
    _check_teachers(run)
    missing_lora(run)
    check_guidance(run)
    check_prior(run)
    _check_captions(recipe)
    _check_quantized(run)
    try:
        check_frozen_parts(recipe.data)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: data.{error}") from error


def _check_quantized(run: Resolved) -> None:
    """Raise RecipeError if frozen weights are to be quantised and there are none, or no library does it."""
    form = run.recipe.quantize.frozen
    if form is None:
        return
    if all(card.kind == "exact" for card in run.cards):
        raise RecipeError(
            f"{run.name}: quantize.frozen: {form!r} wants a teacher with weights; {run.cards[0].name!r} has none"
        )
    try:
        check_available()
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error


def _check_captions(recipe: Recipe) -> None:
    """Raise RecipeError if a metric wants captions and no file gives them, or a file does and no network reads text."""
    given = recipe.evaluation.captions is not None
    if given and recipe.data.text is None:
        raise RecipeError(f"{recipe.name}: evaluation.captions: the student reads no text; data.text encodes captions")
    if not given and any(spec.wants_captions for spec in recipe.metrics):
        raise RecipeError(f"{recipe.name}: metrics: clip_score wants evaluation.captions, a file of captions")


def missing_parts(run: Resolved) -> list[str]:
    """Return what metrics and frozen networks of the data need that is not on this machine, a line each."""
    recipe = run.recipe
    parts = (("data.autoencoder.source", recipe.data.autoencoder), ("data.text.source", recipe.data.text))
    lacks = [*lacking(recipe.metrics), *_missing_captions(recipe), *missing_lora(run)]
    return [*lacks, *(line for key, part in parts if (line := _missing_source(key, part)))]


def missing_lora(run: Resolved) -> list[str]:
    """Return the LoRAs that the recipe names and that are not on this machine, a line each.

    Raises RecipeError for one that does not exist, or whose teacher is not a diffusers model.
    """
    named: list[tuple[str, str]] = []
    for key, slot, cards in (
        ("teacher", run.recipe.teacher, run.cards),
        ("coupling.teacher", pairs_teacher(run.recipe), run.pairs_cards),
    ):
        if slot is not None and slot.lora is not None:
            if cards[0].kind != "diffusers":
                what = f"wants a teacher of kind diffusers; {cards[0].name!r} is of kind {cards[0].kind}"
                raise RecipeError(f"{run.name}: {key}.lora: {slot.lora!r} {what}")
            named.append((f"{key}.lora", slot.lora))
    start = run.recipe.start
    if isinstance(start, FromTeacher) and start.lora_start is not None:
        named.append(("student.lora_start", start.lora_start))
    try:
        return [line for key, source in named if (line := check_lora(source, key)) is not None]
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error


def _missing_captions(recipe: Recipe) -> list[str]:
    try:
        if recipe.evaluation.captions is not None:
            read_prompts(recipe.evaluation.captions)
        return []
    except ValueError as error:
        return [f"evaluation.captions: {error}"]


def _missing_source(key: str, part: Any) -> str | None:
    source = part.source if isinstance(part, HasSource) else None
    if source in (None, MINILM_SOURCE) or Path(source).is_dir():
        return None
    if not is_hub_id(source):
        return f"{key}: {source!r}: no such folder, and no hub id (owner/name)"
    revision = part.revision if isinstance(part, HasRevision) else None
    here = in_hub_cache(source, ("config.json", "vae/config.json", "model_index.json"), revision)
    return None if here else f"{key}: {source!r}: not on this machine; fit fetches it"


def _check_teachers(run: Resolved) -> None:
    """Raise RecipeError if a pretrained teacher is missing, not supported, or has other latents. Reads no weights."""
    for card in run.cards:
        if card.kind == "module" and (line := missing_weights(card)):
            raise RecipeError(f"{run.name}: {line}")
        if card.kind == "converted" and (line := missing_weights(card)):
            raise RecipeError(f"{run.name}: teacher.card: {line}")
        try:
            if card.kind == "diffusers":
                read_spec(card.pipeline, card.revision).check_teacher(tuple(card.shape))
        except ValueError as error:
            raise RecipeError(f"{run.name}: teacher.card: {card.name!r}: {error}") from error
        if card.kind == "diffusers":
            _check_latents(run, card)


def _check_latents(run: Resolved, card: Card) -> None:
    autoencoder = run.data.autoencoder
    if isinstance(autoencoder, Autoencoder) and autoencoder.source is not None and Path(autoencoder.source).is_dir():
        try:
            autoencoder.check_channels(card.shape[0])
        except ValueError as error:
            raise RecipeError(f"{run.name}: data.{error}, the first of the shape of {card.name!r}") from error


def check_prior(run: Resolved) -> None:
    """Raise RecipeError if the flow of codes belongs to another encoder, or the teacher's paths start at another
    prior.
    """
    prior, ours = run.recipe.prior, run.prior
    if isinstance(prior, Learned) and isinstance(prior.z, FlowCodes):
        _check_codes(run)
    trained = [*run.teachers, *run.pairs_teachers]
    for teacher in trained:
        check_start(run, teacher.prior)
    if ours is not None and not trained and run.cards:
        check_start(run, None)


def _check_codes(run: Resolved) -> None:
    trained, flow = (one.recipe for one in run.priors)
    of = [one.recipe for one in run.priors[1].coders]
    if not of or of[0].hash() != trained.hash():
        what = f"the codes of {of[0].name!r} ({of[0].hash()})" if of else "no codes (data of kind codes)"
        raise RecipeError(
            f"{run.name}: prior.z.recipe: {flow.name!r} does not match the encoder: it is trained on {what}, "
            f"not on those of {trained.name!r} ({trained.hash()}); what prior.overrides changes, "
            'prior.z.overrides must change too, as ["data.overrides=[...]"]'
        )


def check_start(run: Resolved, theirs: Shipped | None) -> None:
    """Raise RecipeError unless the teacher's paths start where the recipe's do."""
    ours = run.prior
    if (ours is None) != (theirs is None) or (ours is not None and not ours.same_start(theirs)):
        starts = f"the teacher's paths start at {theirs or 'N(0, I)'}, the recipe's at {ours or 'N(0, I)'}"
        raise RecipeError(f"{run.name}: prior: {starts}")
