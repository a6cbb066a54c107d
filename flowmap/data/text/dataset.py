"""Sentences as samples: token rows for a text autoencoder, or the latents of a frozen one for a flow.

The held-out part shares no entry (see Sentence.keys) and no text with the training part. Attributes are conditions: one
int64 number per sentence, -1 where it has none. Source of the setting: Language Rectified Flow, arXiv:2403.16995.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import BelowOne, Count, MaxTokens, Range, Seed
from flowmap.base.schema import added
from flowmap.base.tagger import TAGS
from flowmap.data.dataset import Dataset, Source, looked_at
from flowmap.data.text.described import SIDES, Described, LatentSides, Tags, TokenSides, parts_of
from flowmap.data.text.latents import Latent, TextCoder, WithTokenizer
from flowmap.data.text.sources import Sentence, TextSource, WordNet
from flowmap.data.text.token_rows import TAGGER, TokenCondition
from flowmap.data.text.tokens import BPE, Tokenizer, Tokens
from flowmap.flow.types import Cond

LENGTH = "length"
SIDES_AS = ("latents", "tokens")
MAX_LENGTH = 24  # words; longer sentences are of the last class of the attribute "length"


@dataclass(frozen=True)
class Attribute:
    """A condition of sentences: its name, and the values of its numbers 0, 1, ...

    seen: how many of them, from the first, training has seen; None: all. Networks have a row for every value, so that
    lengths of any data fit the weights of any other.
    """

    name: str
    values: tuple[str, ...]
    seen: int | None = None

    @property
    def known(self) -> tuple[str, ...]:
        """The values that a user may request."""
        return self.values[: self.seen]

    def number(self, value: Any) -> int:
        """The number of a value, given by name (5 is "5" where a value has that name) or as the number (-1: none; never
        a length).

        ValueError names what is allowed.
        """
        whole = isinstance(value, int) and not isinstance(value, bool)
        name = str(value) if whole else value
        if isinstance(name, str) and name in self.known:
            return self.known.index(name)
        if whole and self.name != LENGTH and -1 <= value < len(self.known):
            return value
        shown = f"1 to {len(self.known)} words" if self.name == LENGTH else ", ".join(self.known[:60])
        raise ValueError(f"{self.name}: {value!r} was never seen; allowed: {shown}")


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Sentences of a source. A sample is a row of tokens, or with `autoencoder` the latents of the sentence.

    attributes       those that become conditions; every source has "length" (in words). Each is dropped with
                     probability drop_attribute, all with drop_condition
    only             "attribute=value" that every sentence must have
    held_out         the share of entries
    infill           a sample is the middle third of a sentence, or the text between the sides that the source gives
                     (sentences.left and right); both sides are the conditions "left" and "right"
    sides            "latents": each side is one vector; "tokens": each side is its tokens, of which the `side_tokens`
                     next to the middle are kept
    tags             the condition "tags", the part-of-speech tags of the sentence: "tagger" for those of
                     base/tagger.py (extra `text`), or an attribute that has them, with spaces between. At most
                     `max_tags` are kept
    max_words        sentences of more words are left out and counted ("long")
    common_words     sentences with a word that is not among so many most frequent ones are left out ("rare")
    root             the folder of the latents
    """

    sentences: TextSource = WordNet()
    tokenizer: Tokenizer | None = None
    autoencoder: TextCoder | None = None
    attributes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    drop_attribute: BelowOne = 0.0
    held_out: BelowOne = 0.02
    infill: bool = False
    limit: Annotated[int, Range(2, 1_000_000_000)] | None = None
    max_words: Count | None = None
    common_words: Count | None = None
    seed: Seed = 0
    root: str = ""
    sides: str = added("latents")
    side_tokens: MaxTokens = added(16)
    tags: str | None = added(None)
    max_tags: Count = added(MAX_LENGTH)
    in_pixels: ClassVar[bool] = False
    quick: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.autoencoder is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: the text autoencoder brings its own; leave one of the two out")
        if self.infill and self.autoencoder is None:
            raise ValueError("infill: wants latents, so an autoencoder")
        if any("=" not in rule for rule in self.only):
            raise ValueError(f"only: {list(self.only)} must be a list of attribute=value")
        if self.sides not in SIDES_AS:
            raise ValueError(f"sides: {self.sides!r} is not one of {', '.join(SIDES_AS)}")
        if self.sides != "latents" and not self.infill:
            raise ValueError(f"sides: {self.sides!r} is for infilling; set infill: true")
        names = (*(SIDES if self.infill else ()), *((TAGS,) if self.tags else ()))
        if taken := [name for name in names if name in self.attributes]:
            raise ValueError(f"attributes: {taken[0]!r} is a condition of another kind here; rename the attribute")

    def read(self) -> tuple[list[Sentence], list[Sentence], tuple[Attribute, ...], Counter]:
        """(training sentences, held-out ones, attributes, counts of those left out).

        Raises ValueError where sentences cannot be read, an attribute is unknown, or no sentence is left.
        """
        found, counts = self.sentences.read()
        kept = self._chosen(self._plain(found, counts))
        train, held_out = split(kept, self.held_out, self.seed, counts)
        if not train:
            raise ValueError(
                f"data.held_out: {self.held_out} leaves nothing of {len(kept)} sentences ({dict(counts)} left out)"
            )
        return train, held_out, tuple(_attribute(name, train) for name in self.attributes), counts

    def build(self) -> TextDataset:
        """The data set; ValueError as from read(), or where the autoencoder or a tokenizer cannot be had."""
        train, held_out, attributes, counts = self.read()
        latents = None if self.autoencoder is None else Latent(self.autoencoder, counts, root=self.root)
        tokens = (self.tokenizer or BPE()).fit([one.text for one in train]) if latents is None else None
        code: Any = latents if tokens is None else tokens_of(tokens, counts)
        described = self._described(train, latents, counts)
        parts = [_Part(code, described, part, attributes, self.infill) for part in (train, held_out)]
        return TextDataset(
            "text", parts[0].samples, parts[1].samples, texts=parts[0].texts, held_out_texts=parts[1].texts,
            attributes=attributes, codes=parts[0].codes, held_out_codes=parts[1].codes, counts=counts, tokens=tokens,
            token_conditions=tuple(one for part in described for one in part.token_conditions),
            middles=parts[1 if held_out else 0].middles if self.infill else None,
        )  # fmt: skip

    def _described(self, train: list[Sentence], latents: Latent | None, counts: Counter) -> list[Described]:
        """The sources of conditions other than attributes."""
        found = list[Described]()
        if self.infill and self.sides == "latents":
            assert latents is not None
            found.append(LatentSides(latents))
        elif self.infill:
            assert isinstance(self.autoencoder, WithTokenizer)
            found.append(TokenSides(self.autoencoder.load_tokens(), self.side_tokens, counts))
        if self.tags:
            found.append(Tags(self.tags, self.max_tags, self.infill, train, counts))
        return found

    def identity(self) -> dict[str, Any]:
        """The settings that latents on disk depend on, other than the sentences themselves."""
        assert self.autoencoder is not None
        return {"autoencoder": self.autoencoder.identity(), "infill": self.infill}

    def _plain(self, found: list[Sentence], counts: Counter) -> list[Sentence]:
        """Those that are neither too long nor of rare words."""
        if self.max_words is not None:
            short = [one for one in found if len(one.text.split()) <= self.max_words]
            counts["long"] += len(found) - len(short)
        else:
            short = found
        if self.common_words is None:
            return short
        common = {
            word
            for word, _ in Counter(word for one in found for word in words_of(one.text)).most_common(self.common_words)
        }
        plain = [one for one in short if common.issuperset(words_of(one.text))]
        counts["rare"] += len(short) - len(plain)
        return plain

    def _chosen(self, found: Sequence[Sentence]) -> list[Sentence]:
        known = {LENGTH, *(name for one in found for name in one.attributes)}
        rules = [tuple(rule.split("=", 1)) for rule in self.only]
        tags = [("tags", self.tags)] if self.tags and self.tags != TAGGER else []
        attributes = [("attributes", name) for name in self.attributes]
        for key, name in (*attributes, *(("only", name) for name, _ in rules), *tags):
            if name not in known:
                raise ValueError(
                    f"data.{key}: {name!r} is no attribute of these sentences; allowed: {', '.join(sorted(known))}"
                )
        kept = [one for one in found if all(value_of(one, name) == value for name, value in rules)]
        if not kept and found:
            values = ", ".join(sorted({str(value_of(one, name)) for one in found for name, _ in rules})[:60])
            raise ValueError(f"data.only: {list(self.only)} was never seen; values: {values}")
        if not kept:
            raise ValueError("data.sentences: holds no sentences")
        if kept[0].sides is not None and self.autoencoder is not None and not self.infill:
            raise ValueError("data.infill: the sentences have texts on both sides (sentences.left); set it to true")
        return kept[:: -(-len(kept) // self.limit)] if self.limit else kept


@dataclass(frozen=True, eq=False)
class TextDataset(Dataset):
    """A data set (see data/dataset.py) of sentences; samples are float32: token numbers (N, L), or latents.

    texts: the training sentences as read. codes: the conditions, attributes by number, sides of infilled parts as
    latents or tokens, and tags; those that are tokens are described by `token_conditions`. middles: the true parts of
    the held-out sentences (of the training ones if none are held out); None if nothing is infilled.
    counts: sentences that were "empty", "cut", or left out as they share an entry with the held-out ones ("shared").
    tokens: the tokenizer where samples are token rows.
    """

    texts: Sequence[str] = ()
    held_out_texts: Sequence[str] = ()
    attributes: tuple[Attribute, ...] = ()
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    held_out_codes: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    tokens: Tokens | None = None
    token_conditions: tuple[TokenCondition, ...] = ()
    middles: Sequence[str] | None = None

    @cached_property
    def empty(self) -> Mapping[str, Tensor]:
        """One row of each condition as it is when dropped: -1 of an attribute or of tokens, zeros of latents."""
        return {
            key: torch.full_like(rows[:1], 0 if rows.is_floating_point() else -1) for key, rows in self.codes.items()
        }

    def conditions_at(self, places: Tensor) -> Cond:
        return {key: rows[places] for key, rows in self.codes.items()}

    def held_out_samples(self, num: int | None = None) -> tuple[Tensor, Cond]:
        return self.held_out[:num], {key: rows[:num] for key, rows in self.held_out_codes.items()}

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        return {key: rows[places] for key, rows in self.held_out_codes.items()}

    def wanted(self, num: int) -> list[str] | None:
        """The true middle parts at the first `num` places of an evaluation of infilling; None without infilling."""
        if self.middles is None:
            return None
        return [self.middles[i] for i in looked_at(torch.arange(num), len(self.middles)).tolist()]

    def sentence_counts(self) -> dict[str, int] | None:
        return {"train": len(self), "held_out": len(self.held_out), **self.counts}

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        rows = torch.as_tensor(list(indices))
        return self.train[rows], self.conditions_at(rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Cond]:
        return self.train[index], {key: rows[index] for key, rows in self.codes.items()}

    def of(self, rules: Mapping[str, str], *, held_out: bool = False) -> Tensor:
        """The places of the training (or held-out) sentences with those attributes. Raises ValueError for values never
        seen.
        """
        by_name, codes = {one.name: one for one in self.attributes}, self.held_out_codes if held_out else self.codes
        kept = torch.ones(len(self.held_out if held_out else self.train), dtype=torch.bool)
        for name, value in rules.items():
            if name not in by_name:
                raise ValueError(
                    f"{name}: is no attribute of the data; allowed: {', '.join(by_name) or 'none (data.attributes)'}"
                )
            kept &= codes[name] == by_name[name].number(value)
        return kept.nonzero().flatten()


@dataclass(frozen=True)
class _Part:
    """Training or held-out sentences as tensors."""

    code: Callable[[list[str]], Tensor]
    described: Sequence[Described]
    sentences: Sequence[Sentence]
    attributes: tuple[Attribute, ...]
    infill: bool

    @property
    def texts(self) -> list[str]:
        return [one.text for one in self.sentences]

    @property
    def middles(self) -> list[str]:
        return [parts_of(one)[1] for one in self.sentences]

    @cached_property
    def samples(self) -> Tensor:
        return self.code(self.middles if self.infill else self.texts)

    @cached_property
    def codes(self) -> dict[str, Tensor]:
        contexts = {key: rows for one in self.described for key, rows in one(self.sentences).items()}
        numbers = {
            one.name: torch.tensor([_number(one, s) for s in self.sentences], dtype=torch.int64)
            for one in self.attributes
        }
        return {**contexts, **numbers}


def tokens_of(tokens: Tokens, counts: Counter) -> Callable[[list[str]], Tensor]:
    def code(texts: list[str]) -> Tensor:
        rows, cut = tokens.encode(texts)
        counts["cut"] += cut
        return rows.float()

    return code


def split(
    sentences: Sequence[Sentence], share: float, seed: int, counts: Counter
) -> tuple[list[Sentence], list[Sentence]]:
    """(training, held-out): a sentence is held out if its first key, hashed with the seed, falls in the share.

    No training sentence has a key or a text of a held-out one; those that would are left out and counted as "shared".
    """
    held_out = [one for one in sentences if _draw(one, seed) < share]
    keys, texts = {key for one in held_out for key in one.keys}, {one.text for one in held_out}
    rest = [one for one in sentences if _draw(one, seed) >= share]
    train = [one for one in rest if one.text not in texts and keys.isdisjoint(one.keys)]
    counts["shared"] += len(rest) - len(train)
    return train, held_out


def _draw(sentence: Sentence, seed: int) -> float:
    key = sentence.keys[0] if sentence.keys else sentence.text
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=6).digest(), "big") / 2**48


def words_of(text: str) -> list[str]:
    """The words in lower case, without marks."""
    return re.findall(r"\w+", text.lower())


def value_of(sentence: Sentence, name: str) -> str | None:
    """The value of an attribute, "length" counted here; None where the sentence has none."""
    return str(_length(sentence)) if name == LENGTH else sentence.attributes.get(name)


def _length(sentence: Sentence) -> int:
    """Its words, MAX_LENGTH where it has more."""
    return min(len(sentence.text.split()), MAX_LENGTH)


def _attribute(name: str, sentences: Sequence[Sentence]) -> Attribute:
    if name == LENGTH:
        return Attribute(LENGTH, tuple(str(n + 1) for n in range(MAX_LENGTH)), max(_length(one) for one in sentences))
    return Attribute(name, tuple(sorted({one.attributes[name] for one in sentences if name in one.attributes})))


def _number(attribute: Attribute, sentence: Sentence) -> int:
    value = value_of(sentence, attribute.name)
    return attribute.known.index(value) if value in attribute.known else -1
