"""What a recipe needs before it can run, in order: the teachers that recipes train, each in a run folder of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flowmap.config import RecipeError
from flowmap.recipe import Autoguidance, Recipe, read_recipe, read_resolved, shipped
from flowmap.teachers.card import Card, read_card


@dataclass(frozen=True)
class Stage:
    """One run: a recipe and the folder that it fills."""

    recipe: Recipe
    folder: Path

    @property
    def complete(self) -> bool:
        return is_complete(self.folder, self.recipe)


def runs_root() -> Path:
    """Where runs go: $FLOWMAP_RUNS, or runs/ below the current folder."""
    return Path(os.environ.get("FLOWMAP_RUNS", "runs"))


def plan(recipe: Recipe, folder: Path) -> list[Stage]:
    """The stages that lead to the recipe, itself the last. RecipeError where recipes need each other in a loop."""
    stages: list[Stage] = []
    for needed in _needs(recipe, (recipe.name,)):
        if all(stage.recipe.hash() != needed.hash() for stage in stages):
            stages.append(Stage(needed, dependency_folder(needed)))
    return [*stages, Stage(recipe, folder)]


def _needs(recipe: Recipe, chain: tuple[str, ...]) -> list[Recipe]:
    found = []
    for teacher in teacher_recipes(recipe):
        if teacher.name in chain:
            raise RecipeError(f"{recipe.name}: teacher: recipes need each other in a loop: {' -> '.join((*chain, teacher.name))}")
        found += [*_needs(teacher, (*chain, teacher.name)), teacher]
    return found


def teacher_cards(recipe: Recipe) -> list[Card]:
    """The cards of the teacher and of its weak companion, where there are any."""
    if recipe.teacher is None:
        return []
    guidance = recipe.teacher.guidance
    weak = [guidance.weak] if isinstance(guidance, Autoguidance) and guidance.weak else []
    return [find_card(name) for name in [recipe.teacher.card, *weak]]


def teacher_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes that train those cards, with the slot's overrides; none for other kinds of cards."""
    return [read_recipe(card.recipe, recipe.teacher.overrides) for card in teacher_cards(recipe) if card.kind == "recipe"]


def find_card(name: str) -> Card:
    """The shipped card of that name, or the card file at that path."""
    path = Path(name) if Path(name).is_file() else shipped("teachers") / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        import difflib

        cards = list_cards()
        close = difflib.get_close_matches(name, cards, n=1)
        raise RecipeError(f"teacher.card: no card {name!r}{f', did you mean {close[0]!r}?' if close else ''} Cards: {', '.join(cards)}")
    try:
        return read_card(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def list_cards() -> list[str]:
    root = shipped("teachers")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def dependency_folder(recipe: Recipe) -> Path:
    """runs/<name> if it holds this very recipe's finished run, else runs/<name>-<hash>, so that no run is overwritten by another."""
    plain = runs_root() / recipe.name
    return plain if is_complete(plain, recipe) else runs_root() / f"{recipe.name}-{recipe.hash()}"


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """The folder holds a finished run of this recipe: metrics.json is written last."""
    return (folder / "metrics.json").is_file() and (folder / "student").is_dir() and holds(folder, recipe)


def holds(folder: Path, recipe: Recipe) -> bool:
    """The folder's recipe.yaml is this recipe (up to how it is logged)."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return False
    try:
        return read_resolved(path).hash() == recipe.hash()
    except RecipeError:
        return False
