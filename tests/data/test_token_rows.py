"""Conditions of sentences that are rows of tokens: sides of a gap and tags, from files and from what a user asks."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.data.text.dataset import Text
from flowmap.data.text.sources import TextFiles
from flowmap.data.text.token_rows import TokenCondition, asked_tags, side_rows, tag_rows
from flowmap.data.text.tokens import BPE
from flowmap.flow.draws import RowGenerator
from flowmap.recipe import read_recipe
from flowmap.train.draw import draw_sample

TOKENS = BPE(vocab=280, max_tokens=12).fit(["the cat sat on the mat"])
TAGS = TokenCondition("tags", 3, 4, ("DT", "NN", "VB"))


class Coder:
    """A text autoencoder whose latent is the sentence's length; it keeps what it encoded."""

    def load_tokens(self):
        return TOKENS

    def load(self):
        return self

    def identity(self):
        return {"id": "lengths"}

    def to(self, device):
        return self

    def encode(self, texts, count_cut):
        return torch.tensor([[float(len(one))] for one in texts]), 0


@pytest.fixture
def stories(tmp_path):
    """Lines with the three texts of forty stories, two middles each, and the tags of the middle."""
    path = tmp_path / "stories.jsonl"
    lines = [
        {
            "before": f"story {i} began",
            "text": f"then  number {i} {j}",
            "after": f"it ended {i}",
            "tags": "NN DT VB",
            "none": "",
        }
        for i in range(40)
        for j in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return TextFiles(root=str(path), left="before", right="after")


def test_a_side_keeps_what_is_next_to_the_gap():
    rows, cut = side_rows(TOKENS, ["cat", "", "the cat sat on the mat"], "left", 6)
    whole = [TOKENS.start, *TOKENS.numbers(["the cat sat on the mat"])[0]]
    assert rows[0].tolist() == [-1] * (5 - len(TOKENS.numbers(["cat"])[0])) + [
        TOKENS.start,
        *TOKENS.numbers(["cat"])[0],
    ]
    assert (
        rows[1].tolist() == [-1] * 5 + [TOKENS.start]
        and rows[2].tolist() == whole[-6:]
        and cut.tolist()[:2] == [False] * 2
    )
    rows, cut = side_rows(TOKENS, ["cat", "", "cat sat on the mat, the cat"], "right", 4)
    ids = TOKENS.numbers([" cat"])[0]
    assert rows[0, : len(ids) + 1].tolist() == [*ids, TOKENS.end][:4] and cut[2]
    assert rows[1].tolist() == [TOKENS.end, -1, -1, -1]
    assert rows[2].tolist() == TOKENS.numbers([" cat sat on the mat"])[0][:4]


def test_tags_are_rows_and_what_was_never_seen_is_named():
    rows, cut = tag_rows(TAGS, [["NN", "JJ"], [], ["DT"] * 5])
    assert rows.tolist() == [[1, -1, -1, -1], [-1] * 4, [0] * 4] and cut.tolist() == [False, False, True]
    assert asked_tags(TAGS, ["DT NN", "VB"]).tolist() == [[0, 1, -1, -1], [2, -1, -1, -1]]
    for text, says in (("DT JJ", "'JJ' was never seen; allowed: DT, NN, VB"), (" ", "0 tags"), ("NN " * 5, "5 tags")):
        with pytest.raises(ValueError, match=f"tags: {says}"):
            asked_tags(TAGS, [text])


@pytest.mark.parametrize("sides", ["latents", "tokens"])
def test_the_texts_of_a_file_around_a_middle(stories, sides):
    data = Text(sentences=stories, autoencoder=Coder(), infill=True, sides=sides, side_tokens=5, held_out=0.2).build()
    assert all(text.startswith("then number ") for text in data.texts) and data.wanted(3)[0] in data.held_out_texts
    assert len(data) + len(data.held_out) == 80 and data.train[:, 0].tolist() == [len(text) for text in data.texts]
    shape, dtype = ((1,), torch.float32) if sides == "latents" else ((5,), torch.int64)
    for key in ("left", "right"):
        assert data.codes[key].shape[1:] == shape and data.codes[key].dtype == dtype
        assert data.empty[key].tolist() == [[0.0 if sides == "latents" else -1] * shape[0]]
    assert [one.name for one in data.token_conditions] == ([] if sides == "latents" else ["left", "right"])
    assert data.counts["sides_cut"] == (160 if sides == "tokens" else 0)


def test_the_middles_of_one_story_are_on_one_side_of_the_split(tmp_path):
    rows = [{"left": f"a{i}", "text": f"{i} and {j}", "right": "b"} for i in range(40) for j in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = Text(sentences=TextFiles(root=str(tmp_path), left="left", right="right"), held_out=0.3)
    train, held_out, _, _ = text.read()
    assert held_out and {one.sides for one in train}.isdisjoint(one.sides for one in held_out)
    assert len(train) % 2 == len(held_out) % 2 == 0 and not train[0].attributes


def test_tags_of_a_field_and_of_the_tagger(stories):
    given = Text(sentences=stories, tokenizer=BPE(vocab=280), tags="tags", max_tags=2, held_out=0.2).build()
    assert given.token_conditions == (TokenCondition("tags", 3, 2, ("DT", "NN", "VB")),)
    assert given.codes["tags"][0].tolist() == [1, 0] and given.counts["tags_cut"] > 0
    pytest.importorskip("textblob")
    data = Text(sentences=stories, tokenizer=BPE(vocab=280), tags="tagger", held_out=0.2).build()
    one = data.token_conditions[0]
    assert [one.values[i] for i in data.codes["tags"][0].tolist() if i >= 0] == ["RB", "NN", "CD", "CD"]
    assert data.codes["tags"].shape[1] == one.length == 24


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sides": "words"}, "sides: 'words' is not one of latents, tokens"),
        ({"sides": "tokens"}, "sides: 'tokens' is for infilling; set infill: true"),
        ({"infill": True, "attributes": ("left",)}, "attributes: 'left' is a condition of another kind"),
        ({"tags": "tags", "attributes": ("tags",)}, "attributes: 'tags' is a condition of another kind"),
        ({"tags": "none", "infill": True}, "data.tags: 'none' has no tag of any training sentence"),
        ({"tags": "pos"}, "data.tags: 'pos' is no attribute of these sentences; allowed: length, none, tags"),
        ({}, "data.infill: the sentences have texts on both sides"),
        ({"side_tokens": 1}, "side_tokens: 1 must be 2 or more"),
        ({"max_tags": 0}, "max_tags: 0 must be 1 or more"),
    ],
)
def test_settings_that_do_not_fit(stories, change, says):
    with pytest.raises(ValueError, match=says):
        Text(sentences=stories, autoencoder=Coder(), **change).build()


def test_a_missing_side_is_named(tmp_path):
    with pytest.raises(ValueError, match="right: is missing: sentences.left and right are given together"):
        TextFiles(root=str(tmp_path), left="before")
    (tmp_path / "a.jsonl").write_text('{"text": "b", "left": "a", "right": ""}\n{"text": "b", "left": "a"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: has no text 'right'"):
        TextFiles(root=str(tmp_path), left="left", right="right").read()
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt:1: is a line of text; sentences.left and right are columns"):
        TextFiles(root=str(tmp_path), left="left", right="right").read()


def test_rows_of_tokens_are_dropped_whole_by_seed_sample_and_step():
    """Not with drop_attribute; what is dropped of a sample does not depend on its batch."""
    recipe = read_recipe("language/wordnet-tags", ["data.drop_condition=0.5", "data.drop_attribute=0.9"])
    cond = {"tags": torch.arange(120).view(40, 3), "kind": torch.arange(40)}
    empty = {"tags": torch.full((1, 3), -1), "kind": torch.tensor([-1])}
    drawn = lambda rows, first: (
        draw_sample(
            recipe,
            torch.zeros(len(rows), 2),
            {key: value[rows] for key, value in cond.items()},
            RowGenerator("train/0", rows + first),
            empty,
        ).cond
    )
    every = torch.arange(40)
    whole, part, later = drawn(every, 0), drawn(every[10:25], 0), drawn(every, 40)
    dropped = (whole["tags"] == -1).all(1)
    assert 5 < int(dropped.sum()) < 35 and torch.equal(whole["tags"][~dropped], cond["tags"][~dropped])
    assert int((whole["kind"] == -1).sum()) > int(dropped.sum())
    assert torch.equal(part["tags"], whole["tags"][10:25]) and not torch.equal(later["tags"], whole["tags"])
