"""The outline of a data set, from the samples and without them, is the same."""

import dataclasses

import pytest

from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.student import student_config
from flowmap.data.outline import outline_of
from flowmap.data.text.tokens import BPE
from flowmap.estimate.outlines import Outlines
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe

SENTENCES = [f"the {colour} {animal} runs" for colour in ("red", "green", "blue") for animal in ("cat", "dog", "ox")]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "lines.txt").write_text("\n".join(SENTENCES * 4))
    source = f"data.sentences={{kind: files, root: '{tmp_path / 'lines.txt'}'}}"
    return read_recipe(
        "language/wordnet-vae",
        [source, "metrics=[]", "data.attributes=[length]", "data.tokenizer={kind: bpe, vocab: 400}"],
    )


def test_an_outline_states_shape_classes_and_one_row_of_conditions():
    data = build_data(resolve(read_recipe("digits")))
    found = outline_of(data)
    assert found.shape == (1, 8, 8) and found.num_classes == 10 and found.class_names == data.class_names
    assert found.sentences is None and {key: tuple(rows.shape) for key, rows in found.conditions.items()} == {
        "class": (1,)
    }


def test_sentences_have_the_same_outline_without_their_rows(text):
    run = resolve(text)
    known, missing = Outlines().of(run)
    read = outline_of(build_data(run))
    assert missing == [] and known.shape == read.shape and known.sentences.attributes == read.sentences.attributes
    assert set(known.conditions) == set(read.conditions) == {"length"}
    assert known.sentences.tokens.conditioning == read.sentences.tokens.conditioning
    # BPE makes at most as many tokens as it is allowed.
    assert read.sentences.tokens.vocab <= known.sentences.tokens.vocab == BPE(vocab=400).outline().vocab


def test_a_configuration_is_the_same_from_the_data_and_from_its_outline():
    recipe = read_recipe(
        "toy/mixture", ["student={kind: mlp, width: 8, depth: 1}", "teacher=null", "objective={kind: flow_matching}"]
    )
    run = resolve(recipe)
    data = build_data(run)
    assert student_config(run, data, None) == student_config(run, outline_of(data), None)
    other = dataclasses.replace(outline_of(data), shape=(3,))
    assert student_config(run, other, None).shape == (3,)


def test_pictures_to_encode_are_required():
    with pytest.raises(RecipeError, match="data.images: is required"):
        read_recipe("digits", ["data={kind: encoded}"])
