"""Conditions of sentences that are rows of tokens: the text on both sides of a gap, and part-of-speech tags.

A row is int64, with -1 where it has no token. A row of -1 alone is no condition; an empty side is not, since each side
includes the token that starts or ends the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.tagger import tagged
from flowmap.data.text.tokens import PairTokens, Tokens

LEFT, RIGHT = "left", "right"
TAGGER = "tagger"  # of data.tags: the tags are those of base/tagger.py
WORDS = "words"  # the vocabulary of the autoencoder's tokenizer


@dataclass(frozen=True)
class TokenCondition:
    """A condition of `length` tokens, each below `size`.

    values: the names of tokens 0, 1, ...; empty for those of the autoencoder's tokenizer.
    """

    name: str
    size: int
    length: int
    values: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> str:
        """Conditions with the same vocabulary share their embeddings."""
        return self.name if self.values else WORDS


def side_rows(tokens: Tokens, texts: Sequence[str], side: str, length: int) -> tuple[Tensor, Tensor]:
    """Rows (N, length) int64, and which texts were cut, (N,) bool.

    The tokens next to the gap are kept. A left side is aligned to the end of its row and a right side to the start, so
    that a place in a row is a distance from the gap.
    """
    rows, cut = torch.full((len(texts), length), -1), []
    spaced = [f" {text}" if text and side == RIGHT else text for text in texts]  # as within a sentence
    for row, ids in zip(rows, tokens.numbers(spaced), strict=True):
        ids = [tokens.start, *ids] if side == LEFT else [*ids, tokens.end]
        cut.append(len(ids) > length)
        kept = torch.tensor(ids[-length:] if side == LEFT else ids[:length])
        (row[length - len(kept) :] if side == LEFT else row[: len(kept)]).copy_(kept)
    return rows, torch.tensor(cut, dtype=torch.bool)


def texts_of_rows(condition: TokenCondition, rows: Tensor, tokens: Tokens | None) -> list[str]:
    """What rows (N, length) say: text by the autoencoder's tokenizer, or tags with spaces between them; "" for none."""
    if condition.values:
        return [" ".join(condition.values[i] for i in row if i >= 0) for row in rows.tolist()]
    assert tokens is not None, "rows of words are of a student with a text autoencoder"
    fast = (tokens.decoder if isinstance(tokens, PairTokens) else tokens).fast
    kept = [[i for i in row if i >= 0 and i not in tokens.special] for row in rows.tolist()]
    return [text.strip() for text in fast.decode_batch(kept, skip_special_tokens=True)]


def tags_of(text: str) -> list[str]:
    """The tags of the words and punctuation marks of a text. Raises ValueError without the package textblob."""
    return [tag for _, tag in tagged(text, "data.tags")]


def tag_rows(condition: TokenCondition, sequences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Rows (N, length) int64, and which sequences were cut at their end, (N,) bool. A tag without a number is -1."""
    numbers = {tag: number for number, tag in enumerate(condition.values)}
    rows = torch.full((len(sequences), condition.length), -1)
    for row, tags in zip(rows, sequences, strict=True):
        found = [numbers.get(tag, -1) for tag in tags[: condition.length]]
        row[: len(found)] = torch.tensor(found, dtype=torch.int64)
    return rows, torch.tensor([len(tags) > condition.length for tags in sequences], dtype=torch.bool)


def asked_tags(condition: TokenCondition, texts: Sequence[str]) -> Tensor:
    """Rows (N, length) of sequences that a user asks for, with spaces between tags.

    Raises ValueError for a sequence that is empty or too long, or has a tag that was never seen.
    """
    sequences = [text.split() for text in texts]
    for tags in sequences:
        if not 1 <= len(tags) <= condition.length:
            raise ValueError(f"{condition.name}: {len(tags)} tags were given; allowed: 1 to {condition.length}")
        unknown = next((tag for tag in tags if tag not in condition.values), None)
        if unknown is not None:
            allowed = ", ".join(condition.values)
            raise ValueError(f"{condition.name}: {unknown!r} was never seen; allowed: {allowed}")
    return tag_rows(condition, sequences)[0]
