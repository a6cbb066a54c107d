"""Folders of the data that runs make: latents of encoded pictures, and pairs of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flowmap.base.schema import short_hash, to_plain
from flowmap.data import Encoded, Folder, Pairs, Text
from flowmap.data.codes import Codes
from flowmap.data.dataset import Source
from flowmap.data.encoded import read_index
from flowmap.data.shards import difference
from flowmap.data.sources import READER
from flowmap.data.teacher_samples import Blank
from flowmap.flow.prior import Learned
from flowmap.plan.dependencies import autoencoder_recipes, code_recipes, pairs_recipes, pairs_spec, prior_recipes
from flowmap.plan.run_folders import runs_root
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe, in_old_words
from flowmap.student.config import SHIPPED_AUTOENCODER

# Settings of the data that no pair depends on.
WHERE = ("root", *(field.name for field in fields(Source) if field.name != "conditional"))


def data_of(recipe: Recipe, folder_of: Callable[[Recipe], Path]) -> Any:
    """Return the recipe's data with folders in place of names: of its latents, and of the run that trains its
    encoder.

    folder_of: returns the run folder of a needed recipe.
    """
    data: Any = recipe.data
    if isinstance(data, Codes) and data.recipe:
        return replace(data, root=str(folder_of(code_recipes(recipe)[0]) / "student"))
    if not isinstance(data, Encoded) and data.autoencoder is None:
        return data
    trained = autoencoder_recipes(recipe)
    if trained:
        folder = folder_of(trained[0]) / "student"
        source = str(folder / SHIPPED_AUTOENCODER if trained[0].artifact == "text_joint" else folder)
        data = replace(data, autoencoder=replace(data.autoencoder, source=source, recipe=None))
    if isinstance(data, Text):
        return data if data.root else replace(data, root=str(runs_root() / "text-latents"))
    if data.root:
        return data
    plain = {
        key: value
        for key, value in to_plain(recipe.data, TABLES, hashed=True).items()
        if key not in (f.name for f in fields(Source))
    }
    return replace(
        data, root=str(_by_hash("encoded", lambda hash_of: (plain, [hash_of(one) for one in trained], READER)))
    )


def pairs_of(recipe: Recipe) -> Pairs:
    """Return the recipe's pairs with their folder: runs/pairs-<hash> unless the recipe names one.

    If they are the samples of a teacher, it is runs/teacher-samples-<hash>.
    """
    spec = pairs_spec(recipe)
    if spec.root:
        return spec
    plain = {key: value for key, value in to_plain(spec, TABLES, hashed=True).items() if key != "shard_items"}
    data = {key: value for key, value in to_plain(recipe.data, TABLES, hashed=True).items() if key not in WHERE}
    needed = [*pairs_recipes(recipe), *autoencoder_recipes(recipe)]

    def parts(hash_of: Callable[[Recipe], str]) -> tuple:
        prior = (
            (in_old_words(to_plain(recipe.prior, TABLES, hashed=True)), [hash_of(one) for one in prior_recipes(recipe)])
            if isinstance(recipe.prior, Learned)
            else ()
        )
        reader = (READER,) if isinstance(recipe.data, (Encoded, Folder)) else ()
        return (plain, data, [hash_of(one) for one in needed], *reader, *prior)

    what = "teacher-samples" if isinstance(recipe.data, Blank) else "pairs"
    return replace(spec, root=str(_by_hash(what, parts)))


def finished_index(spec: Encoded) -> dict[str, Any] | None:
    """Return the index in the folder of the encoding, or None unless it is finished and has these settings."""
    try:
        index = read_index(Path(spec.root))
        differs = difference(index["identity"] | index["chosen"], spec.identity() | spec.chosen())
    except ValueError:  # It is missing or damaged, or its autoencoder is not trained yet.
        return None
    return index if differs is None else None


def _by_hash(what: str, parts: Callable[[Callable[[Recipe], str]], Any]) -> Path:
    """Return runs/<what>-<hash> for a hash of all that a data set on disk depends on; equal data share a folder.

    parts(hash_of): the values that are hashed. An existing folder is used under the name that version 0.1 gave it,
    which hashed all settings of a recipe.
    """
    named, older = (
        runs_root() / f"{what}-{short_hash(parts(hash_of))}" for hash_of in (Recipe.training_hash, Recipe.hash)
    )
    return older if older.is_dir() and not named.is_dir() else named
