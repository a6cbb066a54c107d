"""Tokenizers of sentences to rows of token numbers and back: byte-level BPE trained here, or a transformers model's
own.

A row is the sentence's tokens, then the end token, then padding. A sentence that is too long is cut before the end
token, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from flowmap.base.files import text_digest
from flowmap.base.outside import bounded_text
from flowmap.base.ranges import MaxTokens, Range, check_ranges

FILE, SETTINGS = "tokenizer.json", "tokenizer_settings.json"
SPECIAL = ("<pad>", "<start>", "<end>", "<mask>")
TRAINED_ON = 200_000  # sentences, evenly spaced, that BPE looks at


@dataclass(frozen=True)
class TokensOutline:
    """What a network depends on of a tokenizer: its number of tokens, whether rows are those of two models, and the
    settings that the network takes over."""

    vocab: int
    pair: bool
    conditioning: Mapping[str, Any]


class Tokenizer(Protocol):
    """The settings of a tokenizer; fit(texts) returns it, trained on those texts if it is trained at all."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def row_length(self) -> int:
        """The number of tokens of a row."""
        ...

    def fit(self, texts: Sequence[str]) -> Tokens: ...

    def outline(self) -> TokensOutline:
        """Return the outline without any sentence. Raise ValueError if a file is missing."""
        ...

    def assumed_outline(self) -> TokensOutline:
        """Return an outline for estimates when `outline` raises."""
        ...


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding with `vocab` tokens at most, trained on the training sentences. It decodes any text
    exactly.
    """

    vocab: Annotated[int, Range(256 + len(SPECIAL), 1_000_000)] = 4096
    max_tokens: MaxTokens = 32

    def __post_init__(self):
        check_ranges(self)

    def fit(self, texts: Sequence[str]) -> Tokens:
        """The same texts give the same tokenizer, byte by byte."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers

        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        step = -(-len(texts) // TRAINED_ON)
        fast.train_from_iterator(texts[::step], trainer)
        return Tokens(fast.to_str(), 0, 1, 2, 3, self.max_tokens)

    @property
    def row_length(self) -> int:
        return self.max_tokens

    def outline(self) -> TokensOutline:
        return TokensOutline(self.vocab, False, {"special": (0, 1, 2, 3)})

    def assumed_outline(self) -> TokensOutline:
        return self.outline()


@dataclass(frozen=True)
class Pretrained:
    """The fast tokenizer of a transformers model, from a folder or hub id; nothing of it is trained."""

    source: str
    revision: str | None = None
    max_tokens: MaxTokens = 32

    def __post_init__(self):
        check_ranges(self)

    def fit(self, texts: Sequence[str], key: str = "data.tokenizer.source") -> Tokens:
        """key: the setting that errors name."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.source, revision=self.revision, trust_remote_code=False)
            fast = found.backend_tokenizer
        except Exception as error:  # a foreign folder makes the library raise anything at all
            raise ValueError(
                f"{key}: {self.source!r}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        end = next((i for i in (found.eos_token_id, found.sep_token_id) if i is not None), None)
        if end is None:
            raise ValueError(f"{key}: {self.source!r} has no token that ends a sentence")
        start = next((i for i in (found.bos_token_id, found.cls_token_id) if i is not None), end)
        pad = found.pad_token_id if found.pad_token_id is not None else end
        mask = next((i for i in (found.mask_token_id, found.unk_token_id) if i is not None), start)
        return Tokens(fast.to_str(), pad, start, end, mask, self.max_tokens)

    @property
    def row_length(self) -> int:
        return self.max_tokens

    def outline(self) -> TokensOutline:
        return self.fit([]).outline

    def assumed_outline(self) -> TokensOutline:
        return TokensOutline(50_000, False, {"special": (0, 1, 2, 3)})


@dataclass(frozen=True)
class Pair:
    """Two pretrained tokenizers for a text autoencoder of two models: max_tokens of the encoder's, then of the
    decoder's.
    """

    encoder: str
    decoder: str
    max_tokens: MaxTokens = 32

    def __post_init__(self):
        check_ranges(self)

    def fit(self, texts: Sequence[str]) -> PairTokens:
        sources = {"encoder": self.encoder, "decoder": self.decoder}
        parts = (
            Pretrained(one, max_tokens=self.max_tokens).fit(texts, f"data.tokenizer.{name}")
            for name, one in sources.items()
        )
        return PairTokens(*parts)

    @property
    def row_length(self) -> int:
        return 2 * self.max_tokens

    def outline(self) -> TokensOutline:
        return self.fit([]).outline

    def assumed_outline(self) -> TokensOutline:
        return TokensOutline(0, True, {"special": (0, 1, 2, 3), "encoder_tokens": self.max_tokens})


TOKENIZERS = {"bpe": BPE, "pretrained": Pretrained, "pair": Pair}


class Tokens:
    """A tokenizer that is ready: text -> (N, max_tokens) int64 and back. `model` is the text of a tokenizer.json."""

    def __init__(self, model: str, pad: int, start: int, end: int, mask: int, max_tokens: int):
        from tokenizers import Tokenizer as Fast

        plain = json.loads(model)
        plain["truncation"] = plain["padding"] = None
        self.model, self.fast = json.dumps(plain, ensure_ascii=False), Fast.from_str(json.dumps(plain))
        self.pad, self.start, self.end, self.mask, self.max_tokens = pad, start, end, mask, max_tokens

    pair = False  # whether its rows are those of two models

    @property
    def vocab(self) -> int:
        """One more than the largest token number."""
        return max(self.fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def longest(self) -> int:
        """How many tokens a sentence may have, its end among them."""
        return self.max_tokens

    @property
    def special(self) -> tuple[int, int, int, int]:
        """(pad, start, end, mask)."""
        return self.pad, self.start, self.end, self.mask

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Rows (N, max_tokens) int64, and how many sentences were cut."""
        rows, cut = self.rows(texts)
        return rows, int(cut.sum())

    def rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rows (N, max_tokens) int64, and which sentences were cut, (N,) bool."""
        rows, cut = torch.full((len(texts), self.max_tokens), self.pad), []
        for row, found in zip(rows, self.numbers(texts), strict=True):
            ids = found[: self.max_tokens - 1]
            cut.append(len(ids) < len(found))
            row[: len(ids) + 1] = torch.tensor([*ids, self.end])
        return rows, torch.tensor(cut, dtype=torch.bool)

    def numbers(self, texts: Sequence[str]) -> list[list[int]]:
        """The token numbers of each text, neither cut nor ended."""
        return [found.ids for found in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, rows: Tensor) -> list[str]:
        """The sentences of rows (N, L), each up to its end token."""
        kept = []
        for row in rows.tolist():
            row = row[: row.index(self.end)] if self.end in row else row
            kept.append([i for i in row if i not in (self.pad, self.start, self.mask)])
        return self.fast.decode_batch(kept, skip_special_tokens=True)

    def conditioning(self) -> dict[str, Any]:
        """The settings of the network that depend on the tokenizer."""
        return {"special": self.special}

    @property
    def outline(self) -> TokensOutline:
        return TokensOutline(self.vocab, self.pair, self.conditioning())

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pad", "start", "end", "mask", "max_tokens")}

    def digest(self) -> str:
        """Sixteen hexadecimal digits of all that it does."""
        return text_digest(self.model + repr(self.settings()))


class PairTokens(Tokens):
    """The tokenizers of an encoder and a decoder: rows (N, 2 max_tokens), of which the second half is decoded."""

    pair = True

    def __init__(self, encoder: Tokens, decoder: Tokens):
        self.encoder, self.decoder = encoder, decoder
        self.pad, self.start, self.end, self.mask = decoder.special
        self.max_tokens, self.vocab_of = encoder.max_tokens + decoder.max_tokens, decoder.vocab
        self.model = json.dumps([encoder.model, decoder.model])

    @property
    def vocab(self) -> int:
        return self.vocab_of

    @property
    def longest(self) -> int:
        return self.decoder.max_tokens

    def rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rows (N, 2 max_tokens) int64, and which sentences were cut for either model, (N,) bool."""
        (seen, unseen), (said, unsaid) = self.encoder.rows(texts), self.decoder.rows(texts)
        return torch.cat([seen, said], 1), unseen | unsaid

    def numbers(self, texts: Sequence[str]) -> list[list[int]]:
        """The decoder's token numbers of each text."""
        return self.decoder.numbers(texts)

    def decode(self, rows: Tensor) -> list[str]:
        """Of whole rows, or of the decoder's part alone."""
        return self.decoder.decode(rows[:, -self.decoder.max_tokens :])

    def conditioning(self) -> dict[str, Any]:
        seen = {"pad": self.encoder.pad, "tokens": self.encoder.max_tokens, "vocab": self.encoder.vocab}
        return {"special": self.special} | {f"encoder_{name}": value for name, value in seen.items()}

    def settings(self) -> dict[str, Any]:
        return {"encoder": self.encoder.settings(), "decoder": self.decoder.settings()}


def load_tokens(folder: Path) -> Tokens:
    """The tokenizer of an autoencoder's folder; ValueError names the file that is wrong."""
    settings, model = (bounded_text(folder / name, "json") for name in (SETTINGS, FILE))
    try:
        settings = json.loads(settings)
        if "encoder" in settings:
            parts = zip(json.loads(model), (settings["encoder"], settings["decoder"]), strict=True)
            return PairTokens(
                *(Tokens(part, **{name: int(value) for name, value in one.items()}) for part, one in parts)
            )
        return Tokens(model, **{name: int(value) for name, value in settings.items()})
    except Exception as error:  # tokenizers raises bare exceptions on a file that is none
        raise ValueError(f"{folder / FILE}: is no tokenizer: {str(error).splitlines()[0]}") from error
