"""Metrics of conditioned and edited sentences: does the text follow its conditions, and keep its source?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowmap.base.tagger import TAGS, tagged
from flowmap.metrics.spec import Classes, WithSources
from flowmap.metrics.text import TextMetric, classifier, library
from flowmap.metrics.text_features import check_features, features_of
from flowmap.metrics.text_tags import KINDS, kind_of_phrase

Cond = Mapping[str, Tensor]


@dataclass(frozen=True)
class Control(TextMetric):
    """Whether sentences have the length and the attributes that were asked for.

    length_within: the share of sentences with a number of words within `tolerance` of the one asked for;
    <attribute>_hit: the share in which a classifier finds the attribute asked for. The classifier (logistic regression
    on word and word-pair counts) is fitted to `fitted_on` training sentences; its own accuracy is the baseline.
    """

    tolerance: int = 2
    fitted_on: int = 20_000
    least: ClassVar[Mapping[str, int]] = {"tolerance": 0, "fitted_on": 2}

    def build(self, data: Any) -> Any:
        step = max(1, len(data.texts) // self.fitted_on)
        texts = list(data.texts)[::step]
        fitted = {}
        for attribute in data.attributes:
            numbers = data.codes[attribute.name][::step].tolist()
            if attribute.name != "length" and len({number for number in numbers if number >= 0}) > 1:
                fitted[attribute.name] = classifier(texts, numbers)
        return fitted, {one.name: one.values for one in data.attributes}

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        fitted, values = metric
        row = {}
        for name, numbers in cond.items():
            if name not in values or not len(texts):
                continue
            numbers = numbers[: len(texts)].tolist()
            asked = [i for i, number in enumerate(numbers) if number >= 0]
            if name == "length" and asked:
                most = len(values[name])
                off = [abs(min(len(texts[i].split()), most) - int(values[name][numbers[i]])) for i in asked]
                row["length_within"] = sum(one <= self.tolerance for one in off) / len(asked)
            elif name in fitted and asked:
                found = fitted[name].predict([texts[i] for i in asked])
                row[f"{name}_hit"] = sum(int(a) == numbers[i] for a, i in zip(found, asked, strict=True)) / len(asked)
        return row


@dataclass(frozen=True)
class ByTagger(TextMetric):
    """By the tagger of base/tagger.py; the data must have the condition that is compared."""

    def fits(self, data: Any, *, conditional: bool = True, paired: bool = False) -> None:
        super().fits(data, conditional=conditional, paired=paired)
        self.build(data)

    def check(self) -> None:
        tagged("a word")


@dataclass(frozen=True)
class Phrase(ByTagger):
    """Whether sentences are phrases of the part of speech asked for, by a tagger and the rules of text_tags.py.

    phrase_hit: the share that are; phrase_hit_even: the mean of that share over the parts of speech asked for, with
    equal weights; phrase_chance: the expected phrase_hit of sentences that are independent of their condition. The
    baseline, real definitions, is the ceiling of the tagger and its rules.
    """

    attribute: str = "part_of_speech"

    def build(self, data: Any) -> Any:
        values = next((one.values for one in data.attributes if one.name == self.attribute), None)
        if values is None or not set(values) <= set(KINDS):
            raise ValueError(
                f"metrics.attribute: {self.attribute!r} must be an attribute of the data with values of "
                f"{', '.join(KINDS)}"
            )
        return values

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        numbers = cond[self.attribute][: len(texts)].tolist() if self.attribute in cond else []
        asked = [metric[number] if number >= 0 else None for number in numbers]
        pairs = [(kind, kind_of_phrase(tagged(text))) for kind, text in zip(asked, texts, strict=False) if kind]
        if not pairs:
            return {}
        wanted, found = (Counter(column) for column in zip(*pairs, strict=True))
        hits = Counter(a for a, b in pairs if a == b)
        return {
            "phrase_hit": sum(hits.values()) / len(pairs),
            "phrase_hit_even": sum(hits[kind] / count for kind, count in wanted.items()) / len(wanted),
            "phrase_chance": sum(count * found[kind] for kind, count in wanted.items()) / len(pairs) ** 2,
        }


@dataclass(frozen=True)
class TagHit(ByTagger):
    """Whether sentences have the part-of-speech tags that were asked for (data.tags), by base/tagger.py.

    tag_hit: the share of asked tags that the word, or mark, at the same place has; tags_exactly: the share of sentences
    with exactly those tags; tag_chance: the tag_hit of each sentence with the tags asked of the next one. The baseline,
    real sentences, is 1 where the tags of the data are the tagger's own.
    """

    def build(self, data: Any) -> Any:
        values = next((one.values for one in data.token_conditions if one.name == TAGS), None)
        if values is None:
            raise ValueError("metrics: tag_hit compares tags with those asked for: data.tags")
        return values

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        rows = cond[TAGS][: len(texts)].tolist() if TAGS in cond else []
        pairs = [(_names(metric, row), row, text) for row, text in zip(rows, texts, strict=False) if max(row) >= 0]
        if not pairs:
            return {}
        asked = [tags for tags, _, _ in pairs]
        found = [[tag for _, tag in tagged(text)][: len(row)] for _, row, text in pairs]
        exactly = [len(a) == len(b) and _hits(a, b) == _known(a) for a, b in zip(asked, found, strict=True)]
        total = sum(map(_known, asked))
        return {
            "tag_hit": sum(map(_hits, asked, found)) / total,
            "tags_exactly": sum(exactly) / len(exactly),
            "tag_chance": sum(map(_hits, [*asked[1:], asked[0]], found)) / total,
        }

    def baseline(self, metric: Any, data: Any, classes: Classes | None = None) -> dict[str, float]:
        return {} if data.middles is not None else super().baseline(metric, data, classes)


def _names(values: Sequence[str], row: Sequence[int]) -> list[str | None]:
    """The tags of a row, without the padding at its end; None for one that training has not seen."""
    last = max(place for place, number in enumerate(row) if number >= 0) + 1
    return [values[number] if number >= 0 else None for number in row[:last]]


def _known(asked: Sequence[str | None]) -> int:
    return sum(tag is not None for tag in asked)


def _hits(asked: Sequence[str | None], found: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(asked, found, strict=False))


@dataclass(frozen=True)
class ContentKept(TextMetric):
    """What an edited sentence keeps of its source; no figures if there are no sources.

    BLEU (sacrebleu) and ROUGE-L (rouge-score) against the source, both 0..100, and with `embedding` the cosine of their
    MiniLM embeddings; unchanged: the share of sentences that are equal to their source.
    """

    embedding: bool = False

    def check(self) -> None:
        library("sacrebleu"), library("rouge_score.rouge_scorer")
        if self.embedding:
            check_features("minilm")

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        if sources is None or not len(texts):
            return {}
        sources = list(sources)[: len(texts)]
        bleu = library("sacrebleu").BLEU(effective_order=True)
        rouge = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
        row = {
            "kept_bleu": bleu.corpus_score(list(texts), [sources]).score,
            "kept_rouge_l": 100
            * sum(rouge.score(s, t)["rougeL"].fmeasure for s, t in zip(sources, texts, strict=True))
            / len(texts),
            "unchanged": sum(s == t for s, t in zip(sources, texts, strict=True)) / len(texts),
        }
        if self.embedding:
            a, b = (features_of("minilm")(part) for part in (sources, list(texts)))
            row["kept_minilm"] = float((a * b).sum(1).mean())  # both of length 1
        return row


@dataclass(frozen=True)
class Infilled(TextMetric):
    """BLEU and ROUGE-L, both 0..100, of infilled parts against the true parts of held-out sentences, and the share of
    exact ones.
    """

    def check(self) -> None:
        ContentKept().check()

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        kept = ContentKept().report(metric, texts, cond, sources if "left" in cond else None)
        names = {"kept_bleu": "infilled_bleu", "kept_rouge_l": "infilled_rouge_l", "unchanged": "infilled_exactly"}
        return {names[key]: value for key, value in kept.items()}

    def baseline(self, metric: Any, data: Any, classes: Classes | None = None) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class StyleHit(TextMetric):
    """style_hit: the share of sentences that a classifier takes for the target style; for editing alone.

    The classifier is as Control's, fitted to training sentences of source and target style.
    """

    fitted_on: int = 10_000
    least: ClassVar[Mapping[str, int]] = {"fitted_on": 1}

    def build(self, data: Any) -> Any:
        if not isinstance(data, WithSources):
            return None
        source, target = list(data.source_texts)[: self.fitted_on], list(data.texts)[: self.fitted_on]
        return classifier(source + target, [0] * len(source) + [1] * len(target))

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        return {} if metric is None else {"style_hit": float(metric.predict(list(texts)).mean())}
