"""The outline of a data set: what a student's configuration depends on, known with or without the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowmap.data.text.dataset import Attribute, TextDataset
from flowmap.data.text.token_rows import TokenCondition
from flowmap.data.text.tokens import TokensOutline


@dataclass(frozen=True)
class SentencesOutline:
    """The conditions of sentences, and the tokenizer if samples are rows of tokens (not latents)."""

    attributes: tuple[Attribute, ...] = ()
    contexts: tuple[str, ...] = ()
    token_conditions: tuple[TokenCondition, ...] = ()
    tokens: TokensOutline | None = None


@dataclass(frozen=True)
class DataOutline:
    """Shape, classes and conditions of samples.

    conditions: one row of each condition, (1, ...), for its name and shape. sentences: None unless samples are of
    sentences.
    """

    shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    sentences: SentencesOutline | None = None


def outline_of(data: Any) -> DataOutline:
    """Return the outline of a data set (data/dataset.py), reading the conditions of its first sample."""
    conditions = data.example_conditions()
    sentences = None
    if isinstance(data, TextDataset):
        contexts = tuple(key for key, rows in data.codes.items() if rows.is_floating_point())
        tokens = None if data.tokens is None else data.tokens.outline
        sentences = SentencesOutline(data.attributes, contexts, data.token_conditions, tokens)
    return DataOutline(tuple(data.shape), data.num_classes, data.class_names, conditions, sentences)
