"""What a recipe needs before it can run, in order: autoencoders and teachers that recipes train, each in a run folder of its own, latents, pairs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flowmap.base.files import read_json, write_json, write_text
from flowmap.base.schema import RecipeError, short_hash, to_plain
from flowmap.data import Encoded, Folder, Pairs, Text, pairs
from flowmap.data.codes import Codes
from flowmap.data.dataset import Source
from flowmap.data.encoded import read_index
from flowmap.data.shards import difference
from flowmap.data.sources import READER
from flowmap.flow.prior import Learned
from flowmap.plan.cards import (
    card_of,
    find_card,
    lora_card,
    weights_folder,
)
from flowmap.plan.dependencies import (
    autoencoder_recipes,
    code_recipes,
    pairs_recipes,
    prior_recipes,
    weights_recipes,
)
from flowmap.plan.provenance import WHERE, identity, pairs_spec
from flowmap.plan.same_run import BUILT_ON, name_in_0_1, same_training
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe, in_old_words
from flowmap.student.config import SHIPPED_AUTOENCODER
from flowmap.teachers.card import Card


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


@dataclass(frozen=True)
class Encoding:
    """Pictures that become latents and text embeddings, and the folder that holds them."""

    recipe: Recipe

    @cached_property
    def spec(self) -> Encoded:
        return data_of(self.recipe)

    @property
    def makes(self) -> str:
        return "a data set on disk" if self.spec.autoencoder is None else "latents"

    @property
    def folder(self) -> Path:
        return Path(self.spec.root)

    @property
    def complete(self) -> bool:
        try:
            index, spec = read_index(self.folder), self.spec
            return difference(index["identity"] | index["chosen"], spec.identity() | spec.chosen()) is None
        except ValueError:  # not there, torn, or its autoencoder is still to be trained
            return False


@dataclass(frozen=True)
class Pairing:
    """Pairs that a teacher's ODE makes, and the folder that holds them."""

    recipe: Recipe

    @cached_property
    def folder(self) -> Path:
        return Path(pairs_of(self.recipe).root)

    @property
    def complete(self) -> bool:
        try:
            return (
                pairs.first_difference(pairs.read_index(self.folder)["identity"], pairs_identity(self.recipe)) is None
            )
        except ValueError:  # not there, torn, or its data is still to be encoded
            return False


Needed = Stage | Encoding | Pairing


def plan(recipe: Recipe, folder: Path) -> list[Needed]:
    """What leads to the recipe, in order, itself the last. RecipeError where recipes need each other in a loop."""
    if recipe.lora is not None:
        lora_card(recipe)
    stages: list[Needed] = []
    for needed in _needs(recipe, (recipe.name,)):
        if all(stage.folder != needed.folder for stage in stages):
            stages.append(needed)
    return [*stages, Stage(recipe, folder)]


def _needs(recipe: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    found: list[Needed] = []
    for needed in autoencoder_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.data, Encoded):
        found.append(Encoding(recipe))
    for needed in weights_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.coupling, Pairs):
        pairing = Pairing(recipe)
        for needed in [] if pairing.complete else pairs_recipes(recipe):
            found += _with_needs(recipe, needed, chain)
        found.append(pairing)
    return found


def _with_needs(recipe: Recipe, needed: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    if needed.name in chain:
        raise RecipeError(f"{recipe.name}: recipes need each other in a loop: {' -> '.join((*chain, needed.name))}")
    return [*_needs(needed, (*chain, needed.name)), Stage(needed, dependency_folder(needed))]


def data_of(recipe: Recipe) -> Any:
    """The recipe's data with folders in the place of names: where its latents lie, and where the run that trains its encoder does."""
    data: Any = recipe.data
    if isinstance(data, Codes) and data.recipe:
        return replace(data, root=str(dependency_folder(code_recipes(recipe)[0]) / "student"))
    if not isinstance(data, Encoded) and getattr(data, "autoencoder", None) is None:
        return data
    trained = autoencoder_recipes(recipe)
    if trained:
        folder = dependency_folder(trained[0]) / "student"
        source = str(folder / SHIPPED_AUTOENCODER if trained[0].artifact == "text_joint" else folder)
        data = replace(data, autoencoder=replace(data.autoencoder, source=source, recipe=None))
    if isinstance(data, Text):
        return data if data.root else replace(data, root=str(runs_root() / "text-latents"))
    if data.root:
        return data
    plain = {
        key: value
        for key, value in to_plain(recipe.data, TABLES).items()
        if key not in (f.name for f in fields(Source))
    }
    return replace(
        data, root=str(_by_hash("encoded", lambda hash_of: (plain, [hash_of(one) for one in trained], READER)))
    )


def _by_hash(what: str, parts: Callable[[Callable[[Recipe], str]], Any]) -> Path:
    """runs/<what>-<hash> of all that a data set on disk depends on, how pictures are read among it: recipes that share it share the folder.

    parts(hash_of): what is hashed. A folder that is there under 0.1's name, which hashed all settings of a recipe, is taken.
    """
    named, older = (
        runs_root() / f"{what}-{short_hash(parts(hash_of))}" for hash_of in (Recipe.training_hash, Recipe.hash)
    )
    return older if older.is_dir() and not named.is_dir() else named


def pairs_of(recipe: Recipe) -> Pairs:
    """The recipe's pairs with the folder where they lie: runs/pairs-<hash> unless it names one."""
    spec = pairs_spec(recipe)
    if spec.root:
        return spec
    plain = {key: value for key, value in to_plain(spec, TABLES).items() if key != "shard_items"}
    data = {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in WHERE}
    needed = [*pairs_recipes(recipe), *autoencoder_recipes(recipe)]

    def parts(hash_of: Callable[[Recipe], str]) -> tuple:
        prior = (
            (in_old_words(to_plain(recipe.prior, TABLES)), [hash_of(one) for one in prior_recipes(recipe)])
            if isinstance(recipe.prior, Learned)
            else ()
        )
        reader = (READER,) if isinstance(recipe.data, (Encoded, Folder)) else ()
        return (plain, data, [hash_of(one) for one in needed], *reader, *prior)

    return replace(spec, root=str(_by_hash("pairs", parts)))


def pairs_identity(recipe: Recipe) -> dict[str, Any]:
    """The provenance of the recipe's pairs (provenance.py), as things are on this machine."""
    return identity(recipe, data_of(recipe), card_of, find_card, weights_of)


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
