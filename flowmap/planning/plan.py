"""What a recipe needs before it can run, in order: autoencoders and teachers that recipes train, each in a run folder of its own, latents, pairs."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from flowmap.base.files import read_json, write_json, write_text
from flowmap.base.schema import RecipeError, short_hash, to_plain
from flowmap.data import Encoded, Folder, Pairs, Styles, TeacherSlot, Text, pairs
from flowmap.data.codes import Codes
from flowmap.data.dataset import Source
from flowmap.data.encoded import read_index
from flowmap.data.shards import difference
from flowmap.data.sources import READER
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.kinds import TABLES
from flowmap.planning.provenance import WHERE, identity, pairs_spec
from flowmap.planning.same_run import BUILT_ON, name_in_0_1, same_training
from flowmap.recipe import Recipe, shipped
from flowmap.settings import Autoguidance, FromRecipe
from flowmap.student.config import BESIDE
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
            return pairs.unlike(pairs.read_index(self.folder)["identity"], pairs_identity(self.recipe)) is None
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
    for needed in _weights_recipes(recipe):
        found += _with_needs(recipe, needed, chain)
    if isinstance(recipe.coupling, Pairs):
        pairing = Pairing(recipe)
        for needed in [] if pairing.complete else pairs_recipes(recipe):
            found += _with_needs(recipe, needed, chain)
        found.append(pairing)
    return found


def _weights_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes whose weights it learns with or starts from; those of its autoencoder and of its pairs apart, which come before and after."""
    return [*code_recipes(recipe), *prior_recipes(recipe), *teacher_recipes(recipe), *start_recipes(recipe)]


def _with_needs(recipe: Recipe, needed: Recipe, chain: tuple[str, ...]) -> list[Needed]:
    if needed.name in chain:
        raise RecipeError(f"{recipe.name}: recipes need each other in a loop: {' -> '.join((*chain, needed.name))}")
    return [*_needs(needed, (*chain, needed.name)), Stage(needed, dependency_folder(needed))]


def autoencoder_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe that trains the autoencoder of the data, where one does."""
    autoencoder = getattr(recipe.data, "autoencoder", None)
    overrides = getattr(autoencoder, "overrides", ())
    return [recipe.named(autoencoder.recipe, overrides)] if autoencoder is not None and autoencoder.recipe is not None else []


def code_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe that trains the encoder of codes, where they are the data."""
    data = recipe.data
    return [recipe.named(data.recipe, data.overrides)] if isinstance(data, Codes) and data.recipe else []


def prior_recipes(recipe: Recipe) -> list[Recipe]:
    """Where the prior is a learned one, the recipe that trains its auxiliary model, then the one that trains its flow of codes, if any."""
    prior = recipe.prior
    if not isinstance(prior, Learned):
        return []
    flow = [recipe.named(prior.z.recipe, prior.z.overrides)] if isinstance(prior.z, FlowCodes) else []
    return [recipe.named(prior.recipe, prior.overrides), *flow]


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
        source = str(folder / BESIDE if trained[0].leaves == "text_joint" else folder)
        data = replace(data, autoencoder=replace(data.autoencoder, source=source, recipe=None))
    if isinstance(data, Text):
        return data if data.root else replace(data, root=str(runs_root() / "text-latents"))
    if data.root:
        return data
    plain = {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in (f.name for f in fields(Source))}
    return replace(data, root=str(_by_hash("encoded", lambda hash_of: (plain, [hash_of(one) for one in trained], READER))))


def _by_hash(what: str, parts: Callable[[Callable[[Recipe], str]], Any]) -> Path:
    """runs/<what>-<hash> of all that a data set on disk depends on, how pictures are read among it: recipes that share it share the folder.

    parts(hash_of): what is hashed. A folder that is there under 0.1's name, which hashed all settings of a recipe, is taken.
    """
    named, older = (runs_root() / f"{what}-{short_hash(parts(hash_of))}" for hash_of in (Recipe.training_hash, Recipe.hash))
    return older if older.is_dir() and not named.is_dir() else named


def teacher_cards(recipe: Recipe) -> list[Card]:
    """The cards of the teacher and of its weak companion, where there are any."""
    return _cards(recipe.teacher)


def _cards(slot: TeacherSlot | None) -> list[Card]:
    if slot is None:
        return []
    weak = [slot.guidance.weak] if isinstance(slot.guidance, Autoguidance) and slot.guidance.weak else []
    return [card_of(slot), *map(find_card, weak)]


def card_of(slot: TeacherSlot) -> Card:
    """The card that the slot names; of a teacher that is named by its recipe, a card that says so."""
    card = find_card(slot.card) if slot.card is not None else Card(kind="recipe", recipe=slot.recipe, name=slot.name)
    if card.kind == "autoencoder":
        raise RecipeError(f"teacher.card: {card.name!r} is an autoencoder's, and no teacher; data.autoencoder.source names it")
    return card


def lora_card(recipe: Recipe) -> Card:
    """The card of the teacher whose frozen weights lie under the recipe's LoRA student; RecipeError where it is no diffusers model."""
    card = card_of(recipe.teacher) if recipe.teacher else None
    if card is None or card.kind != "diffusers":
        what = "there is none" if card is None else f"{card.name!r} is of kind {card.kind}"
        raise RecipeError(f"{recipe.name}: student.lora: wants a teacher of kind diffusers; {what}")
    return card


def teacher_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes that train those cards, with the slot's overrides; none for other kinds of cards."""
    return _trained(recipe, recipe.teacher)


def _trained(recipe: Recipe, slot: TeacherSlot | None) -> list[Recipe]:
    if slot is None:
        return []
    return [recipe.named(card.trained_by, slot.overrides) for card in _cards(slot) if card.kind == "recipe"]


def start_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe whose student this one's starts from, where it says so."""
    return [recipe.named(recipe.start.recipe, recipe.start.overrides)] if isinstance(recipe.start, FromRecipe) else []


def pairs_teacher(recipe: Recipe) -> TeacherSlot | None:
    """The teacher that makes the recipe's pairs, where a card names it."""
    return recipe.coupling.teacher if isinstance(recipe.coupling, Pairs) else None


def pairs_cards(recipe: Recipe) -> list[Card]:
    return _cards(pairs_teacher(recipe))


def pairs_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes that train what makes the pairs."""
    made_by = pairs_spec(recipe).recipe
    return _trained(recipe, pairs_teacher(recipe)) if made_by is None else [recipe.named(made_by)]


def styles_of(recipe: Recipe) -> Styles | None:
    """What the recipe's flow runs between where that is two styles: its coupling, or that of the editing flow which made its pairs."""
    if isinstance(recipe.coupling, Styles):
        return recipe.coupling
    made_by = pairs_recipes(recipe) if isinstance(recipe.coupling, Pairs) else []
    return styles_of(made_by[0]) if made_by else None


def pairs_of(recipe: Recipe) -> Pairs:
    """The recipe's pairs with the folder where they lie: runs/pairs-<hash> unless it names one."""
    spec = pairs_spec(recipe)
    if spec.root:
        return spec
    plain = {key: value for key, value in to_plain(spec, TABLES).items() if key != "shard_items"}
    data = {key: value for key, value in to_plain(recipe.data, TABLES).items() if key not in WHERE}
    needed = [*pairs_recipes(recipe), *autoencoder_recipes(recipe)]

    def parts(hash_of: Callable[[Recipe], str]) -> tuple:
        prior = (to_plain(recipe.prior, TABLES), [hash_of(one) for one in prior_recipes(recipe)]) if isinstance(recipe.prior, Learned) else ()
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
        return next((part for name in ("transformer", "unet") if (part := folder / name).is_dir()), None) if folder.is_dir() else None
    return weights_folder(named) if named.kind == "converted" else None


def weights_folder(card: Card) -> Path:
    """Where `flowmap import` is told to put a published network's weights: weights/<card>, or in the folder that FLOWMAP_WEIGHTS names."""
    return Path(os.environ.get("FLOWMAP_WEIGHTS", "weights")) / card.name


def find_card(name: str) -> Card:
    """The shipped card of that name, or the card file at that path."""
    path = Path(name) if Path(name).is_file() else shipped("teachers") / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        import difflib

        cards = list_cards()
        close = difflib.get_close_matches(name, cards, n=1)
        raise RecipeError(f"teacher.card: no card {name!r}{f', did you mean {close[0]!r}?' if close else ''} Cards: {', '.join(cards)}")
    state = path.stat()
    card = copy.copy(_read_card(path.resolve(), state.st_size, state.st_mtime_ns))
    if card.kind == "diffusers" and (weights_folder(card) / "model_index.json").is_file():  # converted, or fetched to there
        card.source, card.revision = str(weights_folder(card)), None
    return card


@lru_cache(maxsize=256)
def _read_card(path: Path, size: int, changed: int) -> Card:
    """The card in that file of that size and time of change."""
    try:
        return read_card(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def list_cards() -> list[str]:
    root = shipped("teachers")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def dependency_folder(recipe: Recipe) -> Path:
    """runs/<name> or a runs/<name>-<hash> if it holds this very recipe's finished run, else the latter, of an unfinished one if there is one,
    or of today's hash, so that no run is overwritten by another. (Settings that a later version adds change the hash of a name, not what a
    folder holds.)"""
    named = runs_root() / _name_of(recipe)
    hashed = [named, *sorted(runs_root().glob(f"{glob.escape(recipe.name)}-{'[0-9a-f]' * 8}"))]
    whole = next((folder for folder in (runs_root() / recipe.name, *hashed) if is_complete(folder, recipe)), None)
    return whole or next((folder for folder in hashed if holds(folder, recipe)), named)


def built_on(recipe: Recipe) -> list[str]:
    """The recipes whose runs this one's weights or data come of, as <name>-<hash>, where the hash changes with what those come of in turn."""
    return sorted({_name_of(one) for one in _built_on(recipe)})


def _built_on(recipe: Recipe) -> list[Recipe]:
    by_recipe = isinstance(recipe.coupling, Pairs) and not recipe.coupling.root  # pairs in a folder of the user's own say themselves what they are
    return [*autoencoder_recipes(recipe), *_weights_recipes(recipe), *(pairs_recipes(recipe) if by_recipe else ())]


def _name_of(recipe: Recipe) -> str:
    on = built_on(recipe)
    return f"{recipe.name}-{short_hash((recipe.training_hash(), on)) if on else recipe.training_hash()}"


def trained_run(trained: Recipe, recipe: Recipe, slot: str) -> Path:
    """The folder of the finished run of a recipe that `slot` of another names; RecipeError where there is none."""
    folder = dependency_folder(trained)
    if not (folder / "metrics.json").is_file():
        raise RecipeError(f"{recipe.name}: {slot}: {trained.name!r} is not trained yet; `flowmap fit --recipe {recipe.name}` trains it first")
    return folder


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """The folder holds a finished run of this recipe: metrics.json is written last."""
    return (folder / "metrics.json").is_file() and (folder / "student").is_dir() and holds(folder, recipe)


def holds(folder: Path, recipe: Recipe) -> bool:
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


def mark(folder: Path, recipe: Recipe) -> None:
    """Writes what `holds` looks at."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    if on := built_on(recipe):
        write_json(folder / BUILT_ON, {"recipes": on})
