"""Folders of the runs that recipes name, and whether a folder contains a finished run of a recipe."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from flowmap.base.files import read_json, write_json, write_text
from flowmap.base.schema import short_hash
from flowmap.data import Pairs
from flowmap.plan.dependencies import autoencoder_recipes, pairs_recipes, weights_recipes
from flowmap.plan.same_run import BUILT_ON, name_in_0_1, same_training
from flowmap.recipe.recipe import Recipe


def runs_root() -> Path:
    """Return the folder of all runs: $FLOWMAP_RUNS, or runs/ in the current folder."""
    return Path(os.environ.get("FLOWMAP_RUNS", "runs"))


def dependency_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe that another recipe needs.

    That is runs/<name> or runs/<name>-<hash> if it contains a finished run of exactly this recipe; else a
    runs/<name>-<hash> with an unfinished one; else runs/<name>-<hash of today>. So no run overwrites another.
    (Settings that a later version adds change the hash in a name, but not what a folder contains.)
    """
    named = runs_root() / _name_of(recipe)
    hashed = [named, *sorted(runs_root().glob(f"{glob.escape(recipe.name)}-{'[0-9a-f]' * 8}"))]
    whole = next((folder for folder in (runs_root() / recipe.name, *hashed) if is_complete(folder, recipe)), None)
    return whole or next((folder for folder in hashed if matches(folder, recipe)), named)


def built_on(recipe: Recipe) -> list[str]:
    """Return the runs that this recipe's weights or data depend on, as <name>-<hash>.

    A hash changes with what that run depends on in turn.
    """
    return sorted({_name_of(one) for one in _built_on(recipe)})


def _built_on(recipe: Recipe) -> list[Recipe]:
    # Pairs in a folder that the user names state their provenance themselves.
    by_recipe = isinstance(recipe.coupling, Pairs) and not recipe.coupling.root
    return [*autoencoder_recipes(recipe), *weights_recipes(recipe), *(pairs_recipes(recipe) if by_recipe else ())]


def _name_of(recipe: Recipe) -> str:
    on = built_on(recipe)
    return f"{recipe.name}-{short_hash((recipe.training_hash(), on)) if on else recipe.training_hash()}"


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Return whether the folder contains a finished run of this recipe; metrics.json is written last."""
    return (folder / "metrics.json").is_file() and (folder / "student").is_dir() and matches(folder, recipe)


def matches(folder: Path, recipe: Recipe) -> bool:
    """Return whether the folder's run was trained with the recipe's settings, on the runs that it would use today."""
    if not (folder / "recipe.yaml").is_file():
        return False
    try:
        return same_training(folder, recipe) and _same_built_on(folder / BUILT_ON, recipe)
    except (ValueError, KeyError):
        return False


def _same_built_on(path: Path, recipe: Recipe) -> bool:
    if not path.is_file():  # It depends on no run, or an older version wrote it.
        return True
    there = read_json(path)["recipes"]
    return there == built_on(recipe) or set(there) == {name_in_0_1(dependency_folder(one)) for one in _built_on(recipe)}


def stamp(folder: Path, recipe: Recipe) -> None:
    """Write the files that `matches` reads."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    if on := built_on(recipe):
        write_json(folder / BUILT_ON, {"recipes": on})
