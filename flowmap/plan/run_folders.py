"""Where the runs that recipes name are on this machine, and whether a folder contains a finished run of a recipe."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from flowmap.base.files import read_json, write_json, write_text
from flowmap.base.schema import RecipeError, short_hash
from flowmap.data import Pairs
from flowmap.plan.cards import weights_folder
from flowmap.plan.dependencies import autoencoder_recipes, pairs_recipes, weights_recipes
from flowmap.plan.same_run import BUILT_ON, name_in_0_1, same_training
from flowmap.recipe.recipe import Recipe
from flowmap.teachers.card import Card


def runs_root() -> Path:
    """Where runs go: $FLOWMAP_RUNS, or runs/ below the current folder."""
    return Path(os.environ.get("FLOWMAP_RUNS", "runs"))


def dependency_folder(recipe: Recipe) -> Path:
    """runs/<name> or a runs/<name>-<hash> if it holds this very recipe's finished run, else the latter, of an unfinished one if there is one,
    or of today's hash, so that no run is overwritten by another. (Settings that a later version adds change the hash of a name, not what a
    folder holds.)"""
    named = runs_root() / _name_of(recipe)
    hashed = [named, *sorted(runs_root().glob(f"{glob.escape(recipe.name)}-{'[0-9a-f]' * 8}"))]
    whole = next((folder for folder in (runs_root() / recipe.name, *hashed) if is_complete(folder, recipe)), None)
    return whole or next((folder for folder in hashed if matches(folder, recipe)), named)


def built_on(recipe: Recipe) -> list[str]:
    """The recipes whose runs this one's weights or data come of, as <name>-<hash>, where the hash changes with what those come of in turn."""
    return sorted({_name_of(one) for one in _built_on(recipe)})


def _built_on(recipe: Recipe) -> list[Recipe]:
    by_recipe = (
        isinstance(recipe.coupling, Pairs) and not recipe.coupling.root
    )  # pairs in a folder of the user's own say themselves what they are
    return [*autoencoder_recipes(recipe), *weights_recipes(recipe), *(pairs_recipes(recipe) if by_recipe else ())]


def _name_of(recipe: Recipe) -> str:
    on = built_on(recipe)
    return f"{recipe.name}-{short_hash((recipe.training_hash(), on)) if on else recipe.training_hash()}"


def trained_run(trained: Recipe, recipe: Recipe, slot: str) -> Path:
    """The folder of the finished run of a recipe that `slot` of another names; RecipeError where there is none."""
    folder = dependency_folder(trained)
    if not (folder / "metrics.json").is_file():
        raise RecipeError(
            f"{recipe.name}: {slot}: {trained.name!r} is not trained yet; `flowmap fit --recipe {recipe.name}` trains it first"
        )
    return folder


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """The folder holds a finished run of this recipe: metrics.json is written last."""
    return (folder / "metrics.json").is_file() and (folder / "student").is_dir() and matches(folder, recipe)


def matches(folder: Path, recipe: Recipe) -> bool:
    """The folder's run is trained as the recipe says, and what it was built on is what it would be built on today."""
    if not (folder / "recipe.yaml").is_file():
        return False
    try:
        return same_training(folder, recipe) and _same_built_on(folder / BUILT_ON, recipe)
    except (ValueError, KeyError):
        return False


def _same_built_on(path: Path, recipe: Recipe) -> bool:
    if not path.is_file():  # nothing, or a run of an older version
        return True
    there = read_json(path)["recipes"]
    return there == built_on(recipe) or set(there) == {name_in_0_1(dependency_folder(one)) for one in _built_on(recipe)}


def stamp(folder: Path, recipe: Recipe) -> None:
    """Writes what `holds` looks at."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    if on := built_on(recipe):
        write_json(folder / BUILT_ON, {"recipes": on})


def weights_of(named: Card | Recipe) -> Path | None:
    """The file or folder of the weights that a card or a recipe names; None where they are not on this machine, or there are none."""
    if isinstance(named, Recipe):
        return dependency_folder(named) / "student" / "model.safetensors"
    if named.kind == "diffusers":
        folder = Path(named.pipeline)
        return (
            next((part for name in ("transformer", "unet") if (part := folder / name).is_dir()), None)
            if folder.is_dir()
            else None
        )
    return weights_folder(named) if named.kind == "converted" else None
