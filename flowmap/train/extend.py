"""Go on with a run beyond its end, or at another learning rate: `flowmap fit --extend trainer.steps=N optimizer.lr=X`.

The folder becomes that of the changed recipe. `extended.json` lists what was changed after which step, with the figures
that the student had then: such a run is not the one that the changed recipe gives from its start, unless the schedule
is constant and the learning rate the same.
"""

from __future__ import annotations

from typing import Any

from flowmap.base.files import read_json, write_json
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.plan.plan import Stage
from flowmap.plan.run_folders import matches, stamp
from flowmap.plan.same_run import first_difference
from flowmap.recipe import Recipe
from flowmap.recipe.recipe import read_resolved
from flowmap.train.checkpoint_file import checkpoint_step
from flowmap.train.run_folder import EXTENDED, LAST

CHANGES = (("trainer", "steps"), ("optimizer", "lr"), ("optimizer", "schedule"))
METRICS = "metrics.json"


def extend(run: Stage, log: LogFunction) -> None:
    """Make the run in the folder that of the recipe, whose length, learning rate or schedule differ, and unfinished.

    A run of exactly this recipe stays as it is. RecipeError if other settings differ, or if there is nothing to do.
    """
    folder = run.folder
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"--extend: {folder} has no run (no recipe.yaml)")
    if matches(folder, run.recipe):
        return
    old = read_resolved(folder / "recipe.yaml")
    allowed = ", ".join(".".join(key) for key in CHANGES)
    if other := first_difference(_without_changes(old), _without_changes(run.recipe)):
        raise RecipeError(
            f"--extend: {folder} holds another run (first difference: {other}); it changes {allowed} alone"
        )
    changed = {".".join(key): _both(old, run.recipe, *key) for key in CHANGES}
    changed = {key: both for key, both in changed.items() if both[0] != both[1]}
    if not changed:
        raise RecipeError(
            f"--extend: {folder} is built on other runs than the recipe's today; it changes {allowed} alone"
        )
    step = _step(run)
    log(f"{folder}: extended from step {step}: " + ", ".join(f"{key} {a} -> {b}" for key, (a, b) in changed.items()))
    _record(run, {"step": step, "changed": {key: {"from": a, "to": b} for key, (a, b) in changed.items()}})
    (folder / METRICS).unlink(missing_ok=True)  # from here on the run is not finished
    stamp(folder, run.recipe)


def _without_changes(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.training()
    for slot, key in CHANGES:
        plain[slot] = {name: value for name, value in plain[slot].items() if name != key}
    return plain


def _both(old: Recipe, new: Recipe, slot: str, key: str) -> tuple[Any, Any]:
    return old.training()[slot][key], new.training()[slot][key]


def _step(run: Stage) -> int:
    """The step of the last checkpoint; RecipeError if there is none, or none is left to make."""
    path, steps = run.folder / LAST, run.recipe.trainer.steps
    if not path.exists():
        raise RecipeError(f"--extend: {path} is not there, and without it the run cannot go on")
    try:
        step = checkpoint_step(path)
    except ValueError as error:
        raise RecipeError(f"--extend: {error}") from error
    if steps <= step:
        raise RecipeError(f"--extend: trainer.steps: {steps} must be above {step}, the steps that the run has made")
    return step


def _record(run: Stage, change: dict[str, Any]) -> None:
    """Add the change to extended.json, with the student's figures before it."""
    path, figures = run.folder / EXTENDED, run.folder / METRICS
    before = read_json(path)["changes"] if path.is_file() else []
    change["student"] = read_json(figures)["student"] if figures.is_file() else None
    if not before or before[-1]["step"] < change["step"]:
        before = [*before, change]
    else:  # the command was ended before it had trained
        before = [*before[:-1], {**change, "student": change["student"] or before[-1]["student"]}]
    write_json(path, {"changes": before})
