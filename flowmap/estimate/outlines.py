"""Outlines of the data of several runs, for which each data set is read once, and whether the teachers match them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from flowmap.base.schema import RecipeError, to_plain
from flowmap.base.tagger import TAGS
from flowmap.build.data import build_data, build_samples
from flowmap.data import Encoded, Pairs, TeacherSamples, Text
from flowmap.data.dataset import BaseData, Source
from flowmap.data.outline import DataOutline, SentencesOutline, outline_of
from flowmap.data.shards import INDEX
from flowmap.data.text.dataset import Attribute
from flowmap.data.text.described import SIDES
from flowmap.data.text.latents import WithTokenizer
from flowmap.data.text.token_rows import TokenCondition
from flowmap.data.text.tokens import BPE
from flowmap.nets.text_joint import TextJoint
from flowmap.plan.cards import weights_folder
from flowmap.plan.outlines import Shape, latents_shape, sentences_shape
from flowmap.plan.plan import Pairing, ResolvedRun, Sampling
from flowmap.recipe.kinds import TABLES
from flowmap.student.config import StudentConfig
from flowmap.student.config_file import read_config

# Keys of settings that name what may be missing on this machine.
PLACE = re.compile(r"\b(root|path|source|shards|recipe|sentences|files|name|encoder|decoder)\b")
# Settings of the data that change no sample.
OF_TRAINING = (*(field.name for field in fields(Source)), "drop_attribute")

NUM_TAGS = 48  # about as many as the Penn treebank has

Known = tuple[DataOutline | None, list[str]]


@runtime_checkable
class HasRoot(Protocol):
    """The settings of data in a folder."""

    @property
    def root(self) -> str: ...


class Outlines:
    """The outlines of the data of runs that are examined together; a data set that several use is read once."""

    def __init__(self):
        self._known: dict[tuple[ResolvedRun, bool], Known] = {}
        self._read: dict[str, Any] = {}

    def of(self, run: ResolvedRun, *, whole: bool = True) -> Known:
        """Return the outline of the run's data, None if nothing determines it, and what is missing on this machine.

        The data is read if it is on this machine; otherwise settings, cards and other recipes determine the outline.
        whole: read the data even if that takes long. Raises RecipeError for a mistake in the settings.
        """
        if (run, whole) not in self._known:
            of_text = isinstance(run.recipe.data, Text)
            self._known[run, whole] = self._of_sentences(run) if of_text else self._of_samples(run, whole)
        return self._known[run, whole]

    def _of_samples(self, run: ResolvedRun, whole: bool) -> Known:
        recipe, spec, data, missing = run.recipe, run.recipe.data, None, list[str]()
        there = not spec.quick and isinstance(spec, HasRoot) and bool(spec.root) and Path(spec.root).exists()
        if not any(key.startswith("data") for key in recipe.missing()) and (whole or not there):
            try:
                data = build_data(run, lambda settings: self._once(settings, settings.build))
                if isinstance(recipe.coupling, Pairs) and Pairing(run).complete:
                    build_samples(run, data)
            except RecipeError as error:
                missing += _lacks(run, error)
        return run.outline if data is None else outline_of(data), missing

    def _of_sentences(self, run: ResolvedRun) -> Known:
        """Return the outline of sentences, of which at most the attributes are read, and what is missing."""
        spec, missing = run.recipe.data, list[str]()
        assert isinstance(spec, Text)
        tokenizer = spec.tokenizer or BPE()
        shape, attributes = sentences_shape(run) or (tokenizer.row_length,), tuple[Attribute, ...]()
        try:
            if spec.autoencoder is not None and not run.autoencoders:
                shape = spec.autoencoder.load().shape
            attributes = self._once(spec, lambda: spec.read()[2]) if "???" not in repr(spec.sentences) else ()
        except ValueError as error:
            missing.append(str(error))
        tokens = None
        if spec.autoencoder is None:
            try:
                tokens = tokenizer.outline()
            except ValueError as error:
                missing.append(str(error))
                tokens = tokenizer.assumed_outline()
        in_latents = spec.infill and spec.sides == "latents"
        contexts = {name: torch.zeros(1, *shape) for name in SIDES if in_latents}
        numbers = {name: torch.zeros(1, dtype=torch.int64) for name in spec.attributes}
        rows = _token_conditions(run, spec)
        tokens_given = {one.name: torch.zeros(1, one.length, dtype=torch.int64) for one in rows}
        sentences = SentencesOutline(attributes, tuple(contexts), rows, tokens)
        return DataOutline(shape, conditions={**contexts, **tokens_given, **numbers}, sentences=sentences), missing

    def _once(self, settings: BaseData, read: Any) -> Any:
        """Return what `read` returns, or raise what it raised, for these settings of data.

        It is called once for all settings that differ in training only.
        """
        plain = {key: value for key, value in to_plain(settings, TABLES).items() if key not in OF_TRAINING}
        key = json.dumps(plain, sort_keys=True)
        if key not in self._read:
            try:
                self._read[key] = read()
            except ValueError as error:
                self._read[key] = error
        if isinstance(found := self._read[key], ValueError):
            raise found
        return found


def _token_conditions(run: ResolvedRun, spec: Text) -> tuple[TokenCondition, ...]:
    """Return the conditions of sentences that are tokens, with the number of tags assumed."""
    found = list[TokenCondition]()
    if spec.infill and spec.sides == "tokens":
        found += [TokenCondition(side, _vocab(run, spec), spec.side_tokens) for side in SIDES]
    if spec.tags:
        found.append(TokenCondition(TAGS, NUM_TAGS, spec.max_tags, tuple(map(str, range(NUM_TAGS)))))
    return tuple(found)


def _vocab(run: ResolvedRun, spec: Text) -> int:
    """Return the number of tokens of the text autoencoder's tokenizer: that of its settings if a recipe trains it."""
    trained = [one.recipe.data for one in run.autoencoders]
    try:
        if trained and isinstance(trained[0], Text):
            return max(1, (trained[0].tokenizer or BPE()).outline().vocab)
        assert isinstance(spec.autoencoder, WithTokenizer)
        return spec.autoencoder.load_tokens().vocab
    except ValueError:  # which the outline has named
        return BPE().vocab


def _lacks(run: ResolvedRun, error: RecipeError) -> list[str]:
    """Return what the data lacks on this machine. Raise the error itself if it is about no place of data."""
    recipe = run.recipe
    # `fit` encodes the data in a stage of its own.
    if isinstance(recipe.data, Encoded) and not (Path(run.data.root) / INDEX).is_file():
        try:
            recipe.data.images.length()
            return []
        except ValueError as lacks:
            return [str(lacks).replace("data.root", "data.images.root")]
    if run.coders or (isinstance(recipe.data, TeacherSamples) and not Sampling(run.sampled).complete):
        return []
    known = str(error).removeprefix(f"{recipe.name}: ")
    if not PLACE.search(known.split(":")[0]):
        raise error
    return [known]


def check_outlines(run: ResolvedRun, config: StudentConfig, outlines: Outlines) -> None:
    """Raise RecipeError unless every teacher, and what the student starts from, has the data's shape and classes."""
    if run.recipe.data.images is not None:
        latents_shape(run)
    for name, known in _others(run, outlines):
        if tuple(config.shape) not in [tuple(shape) for shape, _ in known]:
            raise RecipeError(
                f"{run.name}: data: its samples are {tuple(config.shape)}, those of {name} {tuple(known[0][0])}"
            )
        classes = [num for _, num in known]
        if config.num_classes and all(classes) and config.num_classes not in classes:
            raise RecipeError(f"{run.name}: data: has {config.num_classes} classes, {name} {classes[0]}")


def _others(run: ResolvedRun, outlines: Outlines) -> Iterator[tuple[str, list[tuple[Shape, int | None]]]]:
    """Yield the name of every teacher and of what the student starts from, with shapes and classes.

    For a converted network both its weights and its card state them; where they differ, the data may match either.
    """
    for card in (*run.cards, *run.pairs_cards):
        known = [(tuple(card.shape), card.num_classes)] if card.kind != "recipe" and card.shape else []
        config = weights_folder(card) / "config.json"
        if card.kind == "converted" and config.is_file():
            converted = read_config(config)
            known.insert(0, (converted.shape, converted.num_classes))
        if known:
            yield f"the teacher {card.name}", known
    for role, trained in (
        *(("the teacher", one) for one in (*run.teachers, *run.pairs_teachers)),
        *(("the start", one) for one in run.starts),
    ):
        found = _of_student(trained, outlines)
        if found is not None:
            yield f"{role} {trained.name}", [found]


def _of_student(run: ResolvedRun, outlines: Outlines) -> tuple[Shape, int | None] | None:
    """Return shape and classes of that run's student: from its configuration if trained, else from its data."""
    trained = run.recipe
    if run.complete and trained.artifact == "student":
        config = read_config(run.folder / "student" / "config.json")
        return config.shape, config.num_classes
    if isinstance(trained.student, TextJoint):  # Its flow is in the latents of its own autoencoder.
        return trained.student.latent_shape, None
    known = trained.data.outline()
    if known is None or known[1] is None:  # The settings do not state it, so the data is read.
        data, _ = outlines.of(run)
        known = None if data is None else (data.shape, data.num_classes)
    return known and (known[0], known[1] if trained.data.conditional else None)
