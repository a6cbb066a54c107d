"""The conditions of sentences other than attributes, as tensors: both sides of a gap, and part-of-speech tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from flowmap.base.tagger import TAGS
from flowmap.data.text.sources import Sentence
from flowmap.data.text.token_rows import LEFT, RIGHT, TAGGER, TokenCondition, side_rows, tag_rows, tags_of
from flowmap.data.text.tokens import Tokens

SIDES = {LEFT: 0, RIGHT: 2}  # their places in parts_of


def parts_of(sentence: Sentence) -> tuple[str, str, str]:
    """(left, middle, right): the text between the sides that its source gives, otherwise its thirds."""
    if sentence.sides is None:
        return outer_thirds(sentence.text)
    left, right = sentence.sides
    return left, sentence.text, right


class Described:
    """A source of conditions: described(sentences) is {name: (N, ...)}."""

    @property
    def token_conditions(self) -> tuple[TokenCondition, ...]:
        """The conditions that are rows of tokens."""
        return ()

    def __call__(self, sentences: Sequence[Sentence]) -> Mapping[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class LatentSides(Described):
    """Both sides as latents, (N, *shape) float32 each."""

    latents: Callable[[list[str]], Tensor]

    def __call__(self, sentences: Sequence[Sentence]) -> Mapping[str, Tensor]:
        return {side: self.latents([parts_of(one)[place] for one in sentences]) for side, place in SIDES.items()}


@dataclass(frozen=True)
class TokenSides(Described):
    """Both sides as tokens, (N, length) int64 each; sides that were cut are counted as "sides_cut"."""

    tokens: Tokens
    length: int
    counts: Counter

    @property
    def token_conditions(self) -> tuple[TokenCondition, ...]:
        return tuple(TokenCondition(side, self.tokens.vocab, self.length) for side in SIDES)

    def __call__(self, sentences: Sequence[Sentence]) -> Mapping[str, Tensor]:
        found = {}
        for side, place in SIDES.items():
            texts = [parts_of(one)[place] for one in sentences]
            found[side], cut = side_rows(self.tokens, texts, side, self.length)
            self.counts["sides_cut"] += int(cut.sum())
        return found


@dataclass(frozen=True)
class Tags(Described):
    """The tags of sentences, (N, length) int64: of the tagger, or the attribute `source` with spaces between tags.

    infill: they are those of the middle. The tags that can be asked for are those of the training sentences `train`.
    Sequences that were cut are counted as "tags_cut".
    """

    source: str
    length: int
    infill: bool
    train: Sequence[Sentence]
    counts: Counter

    @cached_property
    def _of_train(self) -> list[list[str]]:
        return [self.of(one) for one in self.train]

    @property
    def token_conditions(self) -> tuple[TokenCondition, ...]:
        return (self._condition,)

    @cached_property
    def _condition(self) -> TokenCondition:
        values = tuple(sorted({tag for tags in self._of_train for tag in tags}))
        if not values:
            raise ValueError(f"data.tags: {self.source!r} has no tag of any training sentence")
        return TokenCondition(TAGS, len(values), self.length, values)

    def of(self, sentence: Sentence) -> list[str]:
        if self.source != TAGGER:
            return sentence.attributes.get(self.source, "").split()
        return tags_of(parts_of(sentence)[1] if self.infill else sentence.text)

    def __call__(self, sentences: Sequence[Sentence]) -> Mapping[str, Tensor]:
        tags = self._of_train if sentences is self.train else [self.of(one) for one in sentences]
        rows, cut = tag_rows(self._condition, tags)
        self.counts["tags_cut"] += int(cut.sum())
        return {TAGS: rows}


def outer_thirds(text: str) -> tuple[str, str, str]:
    """(left, middle, right) by words; the middle has at least one word, the others where there are three or more."""
    words = text.split()
    third = len(words) // 3
    return " ".join(words[:third]), " ".join(words[third : len(words) - third]), " ".join(words[len(words) - third :])
