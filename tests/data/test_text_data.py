"""Sentences as data: the split, tokenizers, attributes, and what cannot be read."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import torch

from flowmap.data.text.dataset import Attribute, Text, split
from flowmap.data.text.described import outer_thirds
from flowmap.data.text.sources import HuggingFaceText, Sentence, TextFiles, WordNet, as_sentence
from flowmap.data.text.tokens import BPE, Pretrained, Tokens, load_tokens
from tests.support.tiny_text import wordnet_files


@pytest.fixture
def wordnet(tmp_path):
    return WordNet(root=str(wordnet_files(tmp_path)))


def test_wordnet_is_read(wordnet):
    found, counts = wordnet.read()
    assert len(found) == 80 and not counts
    assert found[0] == Sentence(
        "to say cat and dog n", {"part_of_speech": "noun", "category": "noun.animal"}, ("cat", "dog")
    )
    assert found[1].text == "cat again as n"
    examples = WordNet(root=wordnet.root, examples=True).read()[0]
    assert [one.text for one in examples[:3]] == ["to say cat and dog n", "a cat!", "ah"]


def test_the_held_out_part_shares_no_entry(wordnet):
    found, counts = wordnet.read()[0], Counter()
    train, held_out = split(found, 0.2, 0, counts)
    keys = [{key for one in part for key in one.keys} for part in (train, held_out)]
    assert held_out and train and keys[0].isdisjoint(keys[1])
    assert len(train) + len(held_out) + counts["shared"] == len(found) and counts["shared"] > 0
    assert split(found, 0.2, 0, Counter()) == (train, held_out) and split(found, 0.2, 1, Counter())[1] != held_out


def test_a_text_is_on_one_side_alone():
    same = [Sentence("the same words", {}, (f"entry{i}",)) for i in range(50)] + [
        Sentence(f"number {i}", {}, (str(i),)) for i in range(50)
    ]
    train, held_out = split(same, 0.3, 0, Counter())
    assert {one.text for one in train}.isdisjoint(one.text for one in held_out)


def test_lines_between_two_empty_texts_are_entries_of_their_own():
    """Other lines between the same two texts are one entry."""
    read = lambda i, left: as_sentence({"text": f"line {i}", "a": left, "b": ""}, "text", None, (), "here", ("a", "b"))
    alone, same = [read(i, " ") for i in range(40)], [read(i, "once") for i in range(40)]
    assert {one.keys for one in alone} == {()} and {one.keys for one in same} == {("once\n",)}
    train, held_out = split(alone, 0.3, 0, Counter())
    assert len(train) + len(held_out) == 40 and len(held_out) > 3
    assert 0 in map(len, split(same, 0.3, 0, Counter()))


def test_a_data_set(wordnet):
    data = Text(
        sentences=wordnet, tokenizer=BPE(vocab=300, max_tokens=16), attributes=("category", "length"), held_out=0.2
    ).build()
    assert data.shape == (16,) and data.train.dtype == torch.float32 and len(data.texts) == len(data)
    x0, cond = data.__getitems__([3, 0])
    assert set(cond) == {"category", "length"} and data.tokens.decode(x0.long())[1] == data.texts[0]
    assert data.attributes[0].values == ("adj.all", "adv.all", "noun.animal", "verb.change")
    assert data.empty["category"].tolist() == [-1]
    assert int(cond["length"][1]) == len(data.texts[0].split()) - 1
    kept = data.of({"category": "adv.all"})
    assert len(kept) and all(data.texts[i].endswith(" r") for i in kept.tolist())
    only = Text(sentences=wordnet, tokenizer=BPE(vocab=300), only=("part_of_speech=verb",)).build()
    assert all(text.endswith(" v") for text in only.texts)


class Counting:
    """A text autoencoder that counts how often it is asked: a latent is the sentence's length."""

    asked = 0

    def identity(self):
        return {"id": "counting"}

    def load(self):
        return self

    def to(self, device):
        return self

    def encode(self, texts, count_cut):
        self.asked += 1
        return torch.tensor([[float(len(one))] for one in texts]), 1


def test_latents_are_kept_and_made_anew_where_what_is_kept_is_torn(wordnet, tmp_path):
    coder, folder = Counting(), tmp_path / "latents"
    text = Text(sentences=wordnet, autoencoder=coder, root=str(folder), held_out=0.2)
    first = text.build()
    assert coder.asked == 2 and len(list(folder.iterdir())) == 2
    assert torch.equal(text.build().train, first.train) and coder.asked == 2
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for path in whole:
        path.write_bytes(path.read_bytes()[:-3])
    again = text.build()
    assert coder.asked == 4 and torch.equal(again.train, first.train) and again.counts == first.counts
    assert {path: path.read_bytes() for path in folder.iterdir()} == whole


def test_the_same_texts_give_the_same_tokenizer_and_every_text_comes_back(tmp_path):
    texts = ['the café of naïve owls, 3.5 km away; "why?"', "日本語 and emoji 🦉", "a", "the the the"]
    one, two = (BPE(vocab=290, max_tokens=80).fit(texts) for _ in range(2))
    assert one.model == two.model and one.digest() == two.digest() and one.vocab <= 290
    rows, cut = one.encode(texts)
    assert one.decode(rows) == texts and cut == 0
    (tmp_path / "tokenizer.json").write_text(one.model, encoding="utf-8")
    (tmp_path / "tokenizer_settings.json").write_text(json.dumps(one.settings()))
    assert torch.equal(load_tokens(tmp_path).encode(texts)[0], rows) and load_tokens(tmp_path).digest() == one.digest()


def test_long_sentences_are_cut_and_counted(wordnet):
    data = Text(sentences=wordnet, tokenizer=BPE(vocab=260, max_tokens=4), held_out=0.0).build()
    assert data.counts["cut"] == 80 and (data.train[:, -1] == data.tokens.end).all()


def test_a_tokenizer_of_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    fitted = BPE(vocab=280).fit(["some words to look at", "more words"])
    PreTrainedTokenizerFast(
        tokenizer_object=fitted.fast, eos_token="<end>", bos_token="<start>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    found = Pretrained(source=str(tmp_path), max_tokens=20).fit([])
    assert isinstance(found, Tokens) and (found.pad, found.start, found.end) == (0, 1, 2)
    assert found.decode(found.encode(["more words"])[0]) == ["more words"]
    with pytest.raises(ValueError, match="tokenizer.source"):
        Pretrained(source=str(tmp_path / "nothing")).fit([])


def test_files_of_text_and_jsonl(tmp_path):
    (tmp_path / "good.txt").write_text("very  good \n\n   \nfine\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one", "stars": 5, "story": "a"}\n{"text": "two", "stars": 1}\n{"text": " "}\n'
    )
    found, counts = TextFiles(root=str(tmp_path), key="story").read()
    assert [one.text for one in found] == ["very good", "fine", "one", "two"] and counts["empty"] == 3
    assert found[0].attributes == {"file": "good"} and found[2] == Sentence("one", {"stars": "5"}, ("a",))


def test_hidden_files_are_no_text_and_linked_folders_are(tmp_path):
    root = tmp_path / "texts"
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt", "._a.txt", "folder.txt/b.TXT"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.JSONL").write_text('\ufeff{"text": "three"}\n', encoding="utf-8")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "link" / "up").symlink_to(root)
    assert [one.text for one in TextFiles(root=str(root)).read()[0]] == [
        "text of a.txt",
        "text of folder.txt/b.TXT",
        "three",
    ]


@pytest.mark.parametrize("kind", ["pipe", "zeros", "one line"])
def test_a_text_without_end_is_refused(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a.txt")
    elif kind == "zeros":
        (tmp_path / "a.txt").symlink_to("/dev/zero")
    else:
        (tmp_path / "a.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ValueError, match="a.txt: is not a regular file|a.txt:1: has more than 1048576 bytes"):
        TextFiles(root=str(tmp_path)).read()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"fine\nnot \xff utf-8\n", "a.txt:2: is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', "a.jsonl:1: has no text 'text'"),
        ("a.md", b"x", "holds no"),
        ("a.txt", b"\n  \n", "holds no sentences"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Text(sentences=TextFiles(root=str(tmp_path)), tokenizer=BPE(vocab=260)).build()


def test_a_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "review": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "id": datasets.Value("int64"),
    }
    features = datasets.Features(columns)
    rows = datasets.Dataset.from_dict(
        {"review": ["so  so", "", "fine"], "label": [0, 1, 1], "id": [1, 2, 3]}, features=features
    )
    rows.save_to_disk(tmp_path / "saved")
    found, counts = HuggingFaceText(path=str(tmp_path / "saved"), text="review", columns=("label",), key="id").read()
    assert (
        found == [Sentence("so so", {"label": "bad"}, ("1",)), Sentence("fine", {"label": "good"}, ("3",))]
        and counts["empty"] == 1
    )
    with pytest.raises(ValueError, match="'text' is no column"):
        HuggingFaceText(path=str(tmp_path / "saved")).read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"attributes": ("colour",)},
            "data.attributes: 'colour' is no attribute .* allowed: category, length, part_of_speech",
        ),
        ({"only": ("mood=x",)}, "data.only: 'mood' is no attribute .* allowed: category, length, part_of_speech"),
        ({"only": ("category=noun.bird",)}, "was never seen; values: adj.all, "),
        ({"only": ("category",)}, "only: "),
        ({"held_out": 1.0}, "held_out: 1.0"),
        ({"infill": True}, "infill: "),
        ({"drop_attribute": -0.1}, "drop_attribute: "),
        ({"limit": 0}, "limit: 0"),
    ],
)
def test_settings_are_checked(wordnet, change, says):
    with pytest.raises(ValueError, match=says):
        Text(sentences=wordnet, tokenizer=BPE(vocab=260), **change).build()


def test_the_numbers_of_values():
    part, length = Attribute("part", ("noun", "verb")), Attribute("length", tuple(map(str, range(1, 25))), seen=10)
    assert (
        part.number("verb"),
        part.number(1),
        part.number(-1),
        length.number(3),
        length.number("7"),
        length.number(10),
    ) == (1, 1, -1, 2, 6, 9)
    assert Attribute("stars", ("1", "2", "5")).number(2) == 1  # the value that is called so, not the third
    assert Attribute("length", length.values).number(24) == 23  # as students of an earlier day were kept
    odd = [(part, value) for value in ("adverb", 2, 1.5, None, True)] + [
        (length, value) for value in (0, "many", 2.5, -1, True, 11, "11", 99)
    ]
    for attribute, value in odd:
        allowed = "noun, verb" if attribute is part else "1 to 10 words"
        with pytest.raises(ValueError, match=f"{attribute.name}: {value!r} was never seen; allowed: {allowed}"):
            attribute.number(value)


def test_lengths_are_those_of_the_training_sentences(wordnet):
    for change, seen in (({}, 6), ({"max_words": 4}, 4)):
        data = Text(sentences=wordnet, tokenizer=BPE(vocab=260), attributes=("length",), held_out=0.2, **change).build()
        assert (
            data.attributes[0].known == tuple(str(n + 1) for n in range(seen)) and len(data.attributes[0].values) == 24
        )
        assert int(data.codes["length"].max()) == seen - 1
    with pytest.raises(ValueError, match="length: 5 was never seen; allowed: 1 to 4 words"):
        data.of({"length": 5})


def test_long_sentences_and_rare_words_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\nThe cat, the dog\na dog barks\nthe cat and the dog sat\n")
    source = TextFiles(str(tmp_path))
    kept = lambda **change: Text(sentences=source, held_out=0.0, **change).read()
    train, _, _, counts = kept(max_words=4)
    assert [one.text for one in train] == ["the cat sat", "The cat, the dog", "a dog barks"] and counts["long"] == 1
    train, _, _, counts = kept(common_words=4)  # the, cat, dog, sat
    assert [one.text for one in train] == ["the cat sat", "The cat, the dog"] and counts["rare"] == 2
    with pytest.raises(ValueError, match="common_words: 0 must be 1 or more"):
        Text(common_words=0)
    with pytest.raises(ValueError, match="holds no sentences"):
        kept(max_words=2)


def test_thirds():
    assert outer_thirds("a b c d e f g") == ("a b", "c d e", "f g")
    assert outer_thirds("a") == ("", "a", "") and outer_thirds("a b") == ("", "a b", "")


def test_fetching_wordnet_leaves_what_is_there_and_says_what_to_do_without_apt(tmp_path, monkeypatch, capsys):
    from flowmap.data import fetch

    wordnet_files(tmp_path / "wordnet")
    assert fetch.main(["wordnet", "--out", str(tmp_path)]) == 0 and "nothing to do" in capsys.readouterr().out
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert fetch.main(["wordnet", "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "data.noun" in said and "by hand" not in said and len(said.strip().splitlines()) == 1


def test_wordnet_that_is_not_there_says_how_to_have_it(tmp_path):
    with pytest.raises(ValueError, match="flowmap.data.fetch wordnet"):
        WordNet(root=str(tmp_path)).read()
    (tmp_path / "data.noun").write_text("nothing like it\n")
    with pytest.raises(ValueError, match="data.noun:1: is no line"):
        WordNet(root=str(tmp_path)).read()
