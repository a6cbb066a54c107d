"""The coupling of two unpaired sets: latents of sentences in one style are carried to latents of sentences in another.

Source: Language Rectified Flow, arXiv:2403.16995, editing; minibatch optimal transport: Pooladian et al. 2023,
arXiv:2304.14772. Clock: x0 (t = 0) is the target, x1 (t = 1) the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from flowmap.data.dataset import looked_at
from flowmap.data.text.dataset import TextDataset
from flowmap.flow.draws import Generator, integers
from flowmap.flow.parts import BaseCoupling
from flowmap.flow.types import RecipeView


@dataclass(frozen=True)
class Styles(BaseCoupling):
    """x0 has the attributes of `target`, x1 those of `source`, each a list of attribute=value; x1 is drawn from its
    whole set.

    match: "independent" joins each x0 to any x1; "optimal" joins those of a micro-batch of one process so that the sum
    of |x1 - x0|^2 is least. Then paths are short, and more of a sentence is kept; larger batches find shorter paths.
    """

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    match: str = "independent"

    def __post_init__(self):
        for name in ("source", "target"):
            rules = getattr(self, name)
            if not rules or any("=" not in rule for rule in rules):
                raise ValueError(f"{name}: {list(rules)} must be a list of attribute=value")
        if self.source == self.target:
            raise ValueError(f"target: {list(self.target)} is the source as well")
        if self.match not in ("independent", "optimal"):
            raise ValueError(f"match: {self.match!r} is not one of independent, optimal")

    def check(self, recipe: RecipeView) -> None:
        if recipe.prior.learned:
            raise ValueError("prior: a flow of coupling styles starts at sentences, not at a prior; leave it gaussian")


@dataclass(frozen=True, eq=False)
class StyledDataset(TextDataset):
    """Sentences of the target style (training and held-out), and latents of the source style for them to start from."""

    sources: Tensor = field(kw_only=True)
    held_out_sources: Tensor = field(kw_only=True)
    source_texts: Sequence[str] = ()
    held_out_source_texts: Sequence[str] = ()
    match: str = "independent"

    @classmethod
    def of(cls, data: TextDataset, styles: Styles) -> StyledDataset:  # type: ignore[override]
        """The part of the data in those styles. Raises ValueError where the data is no text, or an attribute or value
        was never seen.
        """
        if not isinstance(data, TextDataset) or data.tokens is not None:
            raise ValueError("coupling: styles joins latents of sentences: data of kind text with an autoencoder")
        places = {}
        for name in ("source", "target"):
            rules = dict(rule.split("=", 1) for rule in getattr(styles, name))
            try:
                places[name] = data.of(rules), data.of(rules, held_out=True)
            except ValueError as error:
                raise ValueError(f"coupling.{name}: {error}") from error
            if not len(places[name][0]):
                raise ValueError(f"coupling.{name}: {list(getattr(styles, name))}: no training sentence has all of it")
        (source, source_out), (target, target_out) = places["source"], places["target"]
        plain = {one.name: getattr(data, one.name) for one in fields(TextDataset)}
        return cls(**plain | {
            "train": data.train[target], "held_out": data.held_out[target_out],
            "texts": _at(data.texts, target), "held_out_texts": _at(data.held_out_texts, target_out),
            "codes": {key: rows[target] for key, rows in data.codes.items()},
            "held_out_codes": {key: rows[target_out] for key, rows in data.held_out_codes.items()},
            "sources": data.train[source], "held_out_sources": data.held_out[source_out],
            "source_texts": _at(data.texts, source), "held_out_source_texts": _at(data.held_out_texts, source_out),
            "match": styles.match,
        })  # fmt: skip

    def partners(self, x0: Tensor, generator: Generator) -> Tensor:
        """x1 for samples x0 (B, ...): training latents of the source, each drawn from all of them."""
        x1 = self.sources[integers(len(x0), len(self.sources), generator).cpu()].to(x0.device)
        return x1[nearest_together(x0, x1)] if self.match == "optimal" else x1

    def starts(self, num: int) -> tuple[Tensor, list[str]]:
        """x1 and its sentences for `num` samples of an evaluation: the held-out ones of the source, repeated if there
        are fewer.
        """
        places = looked_at(torch.arange(num), len(self.held_out_sources))
        return self.held_out_sources[places], _at(self.held_out_source_texts, places)


def nearest_together(x0: Tensor, x1: Tensor) -> Tensor:
    """The order (B,) of x1 in which the sum over the batch of |x1 - x0|^2 is least."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=x1.device)


def _at(texts: Sequence[str], places: Tensor) -> list[str]:
    return [texts[i] for i in places.tolist()]
