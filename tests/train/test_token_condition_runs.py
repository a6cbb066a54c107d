"""Sentences conditioned on tokens at tiny size: infilling between two texts, and part-of-speech tags, from a run on."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import flowmap
from flowmap.data.dataset import Dataset
from flowmap.evaluation.conditions import condition_labels
from flowmap.metrics.text_conditioned import TagHit
from flowmap.recipe import read_recipe
from flowmap.student.config import TextLatents

ROWS = [
    {"left": f"{word} came", "text": f"then {word} saw {other}", "right": f"and {other} left", "tags": tags}
    for word in ("cat", "dog", "hen", "owl")
    for other, tags in (("pigs", "RB NN VBD NNS"), ("a cow", "RB NN VBD DT NN"), ("bees", "RB NN VBD NNS"))
]
SOURCE = "{kind: files, root: PLACE/rows.jsonl, left: left, right: right}"
DATA = f"kind: text, held_out: 0.3, batch_size: 8, sentences: {SOURCE}"
VAE = f"""
name: coder
data: {{{DATA}, tokenizer: {{kind: bpe, vocab: 290, max_tokens: 16}}, conditional: false}}
student: {{kind: text_vae, slots: 2, dims: 4, width: 16, depth: 1, heads: 2}}
objective: {{kind: text_elbo}}
trainer: {{steps: 3, accelerator: cpu}}
log: {{wandb: false, grid_images: 2}}
"""
FLOW = f"""
name: middle
data: {{{DATA}, autoencoder: {{recipe: PLACE/coder.yaml}}, infill: true, sides: tokens, side_tokens: 18, tags: tags,
  max_tags: 5, drop_condition: 0.2}}
student: {{kind: dit, patch: 1, width: 16, depth: 1, heads: 2}}
times: {{kind: uniform}}
objective: {{kind: flow_matching}}
sampler: {{kind: deterministic, steps: [1, 2]}}
trainer: {{steps: 4, accelerator: cpu}}
metrics: [{{kind: distinct, images: 4}}]
evaluation: {{batch_size: 4, teacher_steps: 2}}
log: {{wandb: false, grid_images: 2}}
"""
QUIET = dict(log=lambda message: None)
ASKED = {"left": "cat came", "right": "and pigs left", "tags": "RB NN VBD NNS"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, text in (("coder", VAE), ("middle", FLOW)):
        (folder / f"{name}.yaml").write_text(text.replace("PLACE", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMAP_RUNS", str(folder / "runs"))
        flowmap.fit(read_recipe(folder / "middle.yaml"), folder / "runs" / "middle", **QUIET)
    return folder


@pytest.fixture(scope="module")
def student(place, tmp_path_factory):
    """That of a copied folder, with random weights: after four steps hardly any condition shows."""
    copied = shutil.copytree(place / "runs" / "middle" / "student", tmp_path_factory.mktemp("copied") / "student")
    student = flowmap.load_student(copied)
    torch.manual_seed(0)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return student


def test_the_folder_has_all_that_conditions_need(place, student):
    conditions = {one.name: one for one in student.config.sentences.token_conditions}
    assert [(one.name, one.length, one.vocabulary) for one in conditions.values()] == [
        ("left", 18, "words"), ("right", 18, "words"), ("tags", 5, "tags")
    ]  # fmt: skip
    assert conditions["tags"].values == ("DT", "NN", "NNS", "RB", "VBD") and not student.config.sentences.contexts
    one = flowmap.load_student(place / "runs" / "middle").sample(3, cond=ASKED, seed=5)
    assert one == flowmap.load_student(place / "runs" / "middle").sample(3, cond=ASKED, seed=5)
    figures = json.loads((place / "runs" / "middle" / "metrics.json").read_text())
    assert figures["sentences"]["sides_cut"] >= 0 and "distinct_2" in figures["student"]["1"]


def test_every_condition_changes_the_sample_and_rows_are_independent(student):
    drawn = lambda num=3, **change: student.sample(num, cond={**ASKED, **change}, seed=2, latents=True)
    whole = drawn()
    for change in ({"left": "hen came"}, {"right": "and bees left"}, {"tags": "RB NN VBD DT NN"}):
        assert not torch.allclose(whole, drawn(**change))
    mixed = drawn(left=["cat came", "hen came", "cat came"])
    torch.testing.assert_close(mixed[::2], whole[::2])
    torch.testing.assert_close(drawn(5)[:3], whole)
    rows = student.conditions(3, ASKED)
    assert rows["left"].dtype == torch.int64 and rows["left"].shape == (3, 18)
    torch.testing.assert_close(student.sample(3, cond=rows, seed=2, latents=True), whole)
    nothing = student.conditions(2)
    assert all((nothing[key] == -1).all() for key in ("left", "right", "tags"))


def test_rows_of_a_table_name_their_tags_and_sides(student):
    data = Dataset("few", torch.zeros(3, 2, 4), torch.zeros(0, 2, 4))
    found = condition_labels(student, data, student.conditions(2, {**ASKED, "left": ["cat came", ""]}), 2)
    assert found == [
        "left=cat came, right=and pigs left, tags=RB NN VBD NNS", "right=and pigs left, tags=RB NN VBD NNS"
    ]  # fmt: skip
    assert condition_labels(student, data, student.conditions(2), 2) == ["", ""]


def test_sides_that_are_latents_are_named_as_they_are_decoded():
    sentences = TextLatents(contexts=("left", "right"))
    config = SimpleNamespace(text=None, sentences=sentences, text_autoencoder=None)
    student = SimpleNamespace(config=config, sentences=lambda rows: [f"{len(row)} of {row.sum():g}" for row in rows])
    cond = {"left": torch.ones(2, 3), "right": torch.tensor([[0.0, 0, 0], [0, 2, 0]])}
    data = Dataset("few", torch.zeros(3, 3), torch.zeros(0, 3))
    assert condition_labels(student, data, cond, 2) == ["left=3 of 3", "left=3 of 3, right=3 of 2"]


def test_what_is_asked_wrongly_is_named(student):
    for cond, says in (
        ({"left": "cat came"}, 'right: is missing; left and right go together, "" for an empty one'),
        ({"left": 3, "right": "a"}, "left: 3 was given; allowed: one text, or 2 texts"),
        ({"left": ["a"] * 3, "right": "a"}, "left: 3 given; allowed: one text, or 2 texts"),
        ({"tags": "RB JJ"}, "tags: 'JJ' was never seen; allowed: DT, NN, NNS, RB, VBD"),
        ({"tags": "RB " * 6}, "tags: 6 tags were given; allowed: 1 to 5"),
        ({"tags": torch.zeros(2, 4, dtype=torch.int64)}, r"tags: wants \(2, 5\) whole numbers in -1..4"),
        ({"tags": torch.full((2, 5), 5)}, r"tags: wants \(2, 5\) whole numbers in -1..4"),
    ):
        with pytest.raises(ValueError, match=says):
            student.sample(2, cond=cond)
    with pytest.warns(
        UserWarning, match="left: 1 of 1 are longer than 18 tokens, of which those next to the gap are read"
    ) as seen:
        cut = student.sample(1, cond={"left": "owl " * 20 + "cat " * 20, "right": ""}, latents=True)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="left: 1 of 1"):
        longer = student.sample(1, cond={"left": "hen " * 20 + "cat " * 20, "right": ""}, latents=True)
    assert torch.equal(cut, longer)


def test_a_network_without_attention_is_refused(place, command):
    code, _, err = command("fit", "--recipe", place / "middle.yaml", "student={kind: mlp, width: 8}", "--dry-run")
    assert (
        code == 2 and "student.kind: a network of kind mlp has no attention to the tokens of left, right, tags" in err
    )
    code, out, err = command("fit", "--recipe", place / "middle.yaml", "--dry-run", "name=other")
    assert code == 0 and "nothing is missing" in out, err


def test_tags_are_compared_with_the_sentence(student):
    pytest.importorskip("textblob")
    data = SimpleNamespace(token_conditions=student.config.sentences.token_conditions, texts=(), middles=None)
    metric = TagHit()
    rows = student.conditions(2, {"tags": ["DT NN", "DT NN NNS"]})
    values = metric.build(data)
    row = metric.report(values, ["the cat", "the cat sleeps"], rows)
    assert row == {"tag_hit": pytest.approx(4 / 5), "tags_exactly": 0.5, "tag_chance": pytest.approx(4 / 5)}
    longer = metric.report(values, ["the cat and the dog", ""], rows)
    assert longer == {"tag_hit": pytest.approx(2 / 5), "tags_exactly": 0.0, "tag_chance": pytest.approx(2 / 5)}
    assert metric.report(values, ["the cat"] * 2, student.conditions(2)) == {}
    with pytest.raises(ValueError, match="metrics: tag_hit compares tags with those asked for: data.tags"):
        metric.build(SimpleNamespace(token_conditions=()))
