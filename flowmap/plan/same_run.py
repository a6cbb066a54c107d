"""Compare a run folder's settings with a recipe's: those of training, those of measurement, and its 0.1 name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmap.base.files import read_json
from flowmap.base.schema import short_hash, to_plain
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe, in_old_words, read_plain, read_resolved

BUILT_ON = "built_on.json"  # In a run folder: the runs that its weights or data depend on.
MEASURED = ("sampler", "metrics", "evaluation")


def same_training(folder: Path, recipe: Recipe) -> bool:
    """Return whether the folder's recipe.yaml equals the recipe in all that its weights depend on.

    Raises RecipeError if it cannot be read.
    """
    return read_resolved(folder / "recipe.yaml").training() == recipe.training()


def same_measurement(folder: Path, recipe: Recipe, *keys: str) -> bool:
    """Return whether the folder's run was sampled and measured with the recipe's settings, those of `keys` among
    them.
    """
    return measurement(read_resolved(folder / "recipe.yaml"), *keys) == measurement(recipe, *keys)


def measurement(recipe: Recipe, *keys: str) -> dict[str, Any]:
    """Return the settings with which a trained run is measured, as plain values."""
    return {key: to_plain(getattr(recipe, key), TABLES, hashed=True) for key in (*MEASURED, *keys)}


def first_difference(old: Any, new: Any) -> str | None:
    """Return the first setting that differs, in words; None if none does."""
    old, new = _flat(old), _flat(new)
    key = next((key for key in [*new, *old] if old.get(key, "absent") != new.get(key, "absent")), None)
    return None if key is None else f"{key}, {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} here"


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    return (
        {key: node}
        if items is None
        else {k: v for name, child in items for k, v in _flat(child, f"{key}.{name}".lstrip(".")).items()}
    )


def name_in_0_1(folder: Path) -> str | None:
    """Return <name>-<hash> of the folder's run as version 0.1 wrote it to built_on.json.

    That hash was one of all settings but those of the log.
    """
    if not (folder / "recipe.yaml").is_file():
        return None
    plain = read_plain(folder / "recipe.yaml")
    known = short_hash(in_old_words({key: value for key, value in plain.items() if key != "log"}))
    on = read_json(folder / BUILT_ON)["recipes"] if (folder / BUILT_ON).is_file() else []
    return f"{plain.get('name')}-{short_hash((known, on)) if on else known}"
