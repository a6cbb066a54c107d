"""Kinds of phrases: the rules on given tags, and the tagger on plain definitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowmap.base.tagger import tagged
from flowmap.data.text.dataset import Attribute
from flowmap.metrics.text_conditioned import Phrase
from flowmap.metrics.text_tags import kind_of_phrase

ATTRIBUTE = Attribute("part_of_speech", ("adjective", "noun", "verb"))


def phrase(tags: str) -> str | None:
    words = {"(": "(", ")": ")", "of": "IN"}
    return kind_of_phrase([(one, words.get(one, one)) for one in tags.split()])


@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        ("DT JJ NN", "noun"), ("NN", "noun"), ("JJ CC JJ NN IN DT NN", "noun"),
        ("RB JJ NN", "noun"), ("CD NNS", "noun"),
        ("VB DT NN", "verb"), ("TO VB", "verb"), ("NN DT NN", "verb"), ("RB VB IN NN", "verb"), ("( NN ) VB", "verb"),
        ("of CC VBG TO NN", "adjective"), ("VBG DT NN", "adjective"),
        ("JJ TO VB", "adjective"), ("VBN IN NN", "adjective"),
        ("IN DT JJ NN", "adverb"), ("RB", "adverb"), ("RB CC IN DT JJ NN", "adverb"), ("( NN )", None), ("", None),
    ],
)  # fmt: skip
def test_the_head_says_the_kind(tags, kind):
    assert phrase(tags) == kind


def test_a_bracket_that_does_not_close_hides_the_rest_and_one_that_does_not_open_hides_nothing():
    assert phrase("( DT NN") is None and phrase(") DT NN") == "noun"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the act of making something", "noun"), ("make a hole into a surface", "verb"),
        ("of or relating to fishes", "adjective"),
        ("having a red color", "adjective"), ("in a slow manner", "adverb"), ("slowly and carefully", "adverb"),
    ],
)  # fmt: skip
def test_the_tagger_reads_plain_definitions(text, kind):
    pytest.importorskip("textblob")
    assert kind_of_phrase(tagged(text)) == kind


def test_the_shares_by_hand():
    pytest.importorskip("textblob")
    metric = Phrase().build(SimpleNamespace(attributes=(ATTRIBUTE,)))
    texts = ["the act of making", "a person", "a small dog", "make a hole", "the sea"]
    row = Phrase().report(metric, texts, {"part_of_speech": torch.tensor([1, 1, 2, 2, -1])})
    assert row["phrase_hit"] == 3 / 4 and row["phrase_hit_even"] == (1 + 1 / 2) / 2
    assert row["phrase_chance"] == (2 / 4) * (3 / 4) + (2 / 4) * (1 / 4)
    assert Phrase().report(metric, texts, {}) == {}


def test_other_attributes_are_refused():
    with pytest.raises(ValueError, match="metrics.attribute: 'part_of_speech' must be an attribute of the data"):
        Phrase().build(SimpleNamespace(attributes=(Attribute("category", ("noun", "verb")),)))
    with pytest.raises(ValueError, match="metrics.attribute: 'category'"):
        Phrase(attribute="category").build(SimpleNamespace(attributes=(Attribute("category", ("noun.act",)),)))
