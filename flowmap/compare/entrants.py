"""The recipes of a comparison: of the same data and the same teacher, each at a seed and at its own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from flowmap.base.schema import RecipeError, to_plain
from flowmap.data import Pairs, TeacherSlot
from flowmap.plan.cards import card_of
from flowmap.plan.data_folders import WHERE
from flowmap.plan.dependencies import pairs_recipes, teacher_recipes
from flowmap.plan.plan import resolve
from flowmap.plan.provenance import scale_of
from flowmap.recipe import Recipe, read_recipe
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.settings import FromRecipe

SEED = "seed="  # the start of an override
# settings in steps, which a recipe chose for its own length
LENGTHS = (
    "start",
    "discriminator_start",
    "decay_from",
    "warmup_steps",
    "anneal_steps",
    "perceptual_after_steps",
    "begin_steps",
    "end_steps",
)


def read_entrants(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Recipe]:
    """The recipes with the overrides; raises RecipeError if they cannot be compared."""
    entrants = [_one_teacher(read_recipe(name, overrides)) for name in names]
    if not entrants:
        raise RecipeError("recipes: none were given")
    twice = [e.name for i, e in enumerate(entrants) if any(e.name == other.name for other in entrants[:i])]
    if twice:
        raise RecipeError(
            f"recipes: {twice[0]!r} twice; what is compared must have names of its own (`name:` in a recipe)"
        )
    for entrant in entrants:
        _check(entrant)
        _check_alike(entrants[0], entrant)
    return entrants


def _one_teacher(entrant: Recipe) -> Recipe:
    """The recipe with its teacher's seed, where one is given, for the same teacher of its pairs as well."""
    slot, coupling = entrant.teacher, entrant.coupling
    if slot is None or not isinstance(coupling, Pairs) or coupling.teacher is None:
        return entrant
    seed = [word for word in slot.overrides if word.startswith(SEED)]
    alike = (coupling.teacher.card, coupling.teacher.recipe) == (slot.card, slot.recipe)
    if not seed or not alike or any(word.startswith(SEED) for word in coupling.teacher.overrides):
        return entrant
    return entrant.changed(coupling=replace(coupling, teacher=_told(coupling.teacher, *seed)))


def _check(entrant: Recipe) -> None:
    if entrant.missing():
        raise RecipeError(
            f"{entrant.name}: {', '.join(entrant.missing())}: must be given, as key=value or in a recipe of your own"
        )
    if entrant.artifact != "student":
        raise RecipeError(
            f"{entrant.name}: objective: a run of it writes no student but the artifact {entrant.artifact!r}, "
            "so there are no samples to compare"
        )
    if entrant.trainer.devices * entrant.trainer.num_nodes > 1:
        raise RecipeError(f"{entrant.name}: trainer.devices: {entrant.trainer.devices}; compare trains on one device")


def _check_alike(first: Recipe, other: Recipe) -> None:
    """Raise RecipeError for different data, teachers or guidance (a recipe without a teacher fits any)."""
    pairs = (("data", data_settings(first), data_settings(other)), ("teacher", _taught_by(first), _taught_by(other)))
    for what, mine, theirs in pairs:
        if mine == theirs or mine is None or theirs is None:
            continue
        key = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
        values = f"{key} {mine.get(key)!r} and {theirs.get(key)!r}"
        raise RecipeError(
            f"recipes: {first.name!r} and {other.name!r} are not of the same {what}: {values}; a comparison wants one"
        )


def data_settings(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in WHERE or key == "root"}


def _taught_by(recipe: Recipe) -> dict[str, Any] | None:
    """The teacher of a recipe or of its pairs, and the guidance scale of sampling.

    The range of scales that training draws from may differ.
    """
    slot, scale = recipe.teacher, None
    if isinstance(recipe.coupling, Pairs):
        slot, scale = recipe.coupling.teacher or slot, scale_of(resolve(recipe))
    elif slot is not None and slot.guidance is not None:
        scale = slot.guidance.default
    if slot is None:
        return None
    guidance = to_plain(slot.guidance, TABLES) or {}
    card = card_of(slot)  # a teacher may be named by its card, or by the recipe that trains it
    named: dict[str, Any] = {"card": card.recipe or card.name, "overrides": list(slot.overrides)}
    named |= {} if slot.lora is None else {"lora": slot.lora, "lora_scale": slot.lora_scale}
    return {
        **named,
        **{key: value for key, value in guidance.items() if key not in ("scale", "default")},
        "guidance": scale,
    }


def at_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe, and the recipes that it needs, with that seed.

    A seed among the overrides of the teacher stays: `teacher.overrides=[seed=0]` is one teacher for all seeds.
    """
    changes: dict[str, Any] = {"seed": seed}
    if recipe.teacher is not None and teacher_recipes(recipe):
        changes["teacher"] = _taught_at(recipe.teacher, seed)
    if isinstance(recipe.coupling, Pairs) and recipe.coupling.teacher is not None and pairs_recipes(recipe):
        changes["coupling"] = replace(recipe.coupling, teacher=_taught_at(recipe.coupling.teacher, seed))
    if isinstance(recipe.student, FromRecipe):
        start = at_seed(recipe.named(recipe.student.recipe, recipe.student.overrides), seed)
        mine, theirs = changes.get("teacher", recipe.teacher), start.teacher
        if mine is not None and theirs is not None and (mine.card, mine.recipe) == (theirs.card, theirs.recipe):
            theirs = mine  # one teacher for both, with the comparison's overrides
        words = [f"teacher.overrides={list(theirs.overrides)}"] if theirs is not None and theirs.overrides else []
        changes["student"] = _told(recipe.student, f"seed={seed}", *words)
    return recipe.changed(**changes)


def _told(slot: TeacherSlot | FromRecipe, *words: str) -> Any:
    return replace(slot, overrides=(*slot.overrides, *words))


def _taught_at(slot: TeacherSlot, seed: int) -> TeacherSlot:
    return slot if any(word.startswith(SEED) for word in slot.overrides) else _told(slot, f"{SEED}{seed}")


def of_length(recipe: Recipe, steps: int) -> Recipe:
    """The recipe at another number of steps; warm-ups and decays counted in steps are scaled by the same ratio.

    A cosine schedule and a power-function average depend on the length already; a constant average keeps its decay.
    """
    ratio = steps / recipe.trainer.steps
    trainer = replace(recipe.trainer, steps=steps, checkpoint_every_steps=max(steps // 4, 1))
    return recipe.changed(
        trainer=trainer, optimizer=_stretched(recipe.optimizer, ratio), objective=_stretched(recipe.objective, ratio)
    )


def from_its_start(recipe: Recipe) -> Recipe:
    """The recipe whose objective has all its terms from the first steps on."""
    return recipe.changed(objective=_stretched(recipe.objective, 0.0))


def start_of(objective: Any) -> int:
    """The latest `start` in an objective, at any depth: the step from which it has all its terms; 0 if it has none.

    Of a discriminator it is the step from which it learns, if it starts later than the run.
    """
    inner = [start_of(value) for value in vars(objective).values() if is_dataclass(value)]
    return max([getattr(objective, "discriminator_start", 0) or getattr(objective, "start", 0), *inner])


def _stretched(value: Any, ratio: float) -> Any:
    """A frozen dataclass with the settings in LENGTHS, at any depth, multiplied by the ratio.

    A setting above 0 becomes at least 1 and at most 10^9.
    """
    changes = {}
    for field in fields(value):
        old = getattr(value, field.name)
        if field.name in LENGTHS and old:
            changes[field.name] = min(max(round(old * ratio), 1), 10**9)
        elif is_dataclass(old):
            changes[field.name] = _stretched(old, ratio)
    return replace(value, **changes) if changes else value
