"""Autoencoder and flow trained together at tiny size: a student of sentences, which others may build on."""

from __future__ import annotations

import json

import pytest

import flowmap
from flowmap.recipe import read_recipe
from tests.conftest import no_runs
from tests.support.tiny_text import wordnet_files

JOINT = """
name: both
data: {kind: text, sentences: {kind: wordnet, root: WORDNET}, tokenizer: {kind: bpe, vocab: 300, max_tokens: 12},
  held_out: 0.2, batch_size: 16,
  attributes: [part_of_speech, length], drop_condition: 0.1}
student: {kind: text_joint, autoencoder: {slots: 2, dims: 6, width: 24, depth: 1, heads: 2},
  flow: {kind: dit, patch: 1, width: 16, depth: 1, heads: 2}}
objective: {kind: text_joint, elbo: {kl: 0.01, anneal_steps: 5}, least: 0.1}
times: {kind: uniform}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 8, accelerator: cpu}
metrics: [{kind: frechet, features: pixels, images: 20}, {kind: control, images: 20}]
evaluation: {batch_size: 10}
log: {wandb: false, grid_images: 4}
"""
QUIET = dict(log=lambda message: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    (folder / "both.yaml").write_text(JOINT.replace("WORDNET", str(wordnet_files(folder / "wordnet"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMAP_RUNS", str(folder / "runs"))
        flowmap.fit(read_recipe(folder / "both.yaml"), **QUIET)
    return folder


def test_the_run_leaves_a_student_with_its_own_decoder(folder):
    run = folder / "runs" / "both"
    assert no_runs(run) == set()
    figures = json.loads((run / "metrics.json").read_text())
    assert {"frechet_pixels", "length_within"} <= set(figures["student"]["2"]) and {"exact", "nll_per_token"} <= set(
        figures["autoencoder"]
    )
    student = flowmap.load_student(run)
    assert len(student.sample(3, steps=2, cond={"part_of_speech": "verb"})) == 3 and student.config.shape == (6, 1, 2)
    latents = student.words.encode(["cat again as n", "to say dog and fox v"])
    assert latents.shape == (2, 6, 1, 2)
    again = flowmap.evaluate(run)["student"]["2"]
    assert again["length_within"] == figures["student"]["2"]["length_within"]


def test_a_distillation_builds_on_it(folder, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(folder / "runs"))
    both = folder / "both.yaml"
    plain = (
        f"{{kind: text, sentences: {{kind: wordnet, root: {folder / 'wordnet'}}}, "
        f"autoencoder: {{recipe: {both}}}, held_out: 0.2, batch_size: 16,"
        " attributes: [part_of_speech, length]}"
    )
    changes = [
        "name=few",
        f"data={plain}",
        f"teacher={{recipe: {both}}}",
        "student={kind: from_teacher}",
        "objective={kind: ayf_emd}",
    ]
    run = flowmap.fit(read_recipe(both, [*changes, "times={kind: interval}", "trainer.steps=3", "metrics=[]"]), **QUIET)
    assert (
        len(run.student.sample(2, steps=1)) == 2
        and (run.folder / "student" / "autoencoder" / "tokenizer.json").is_file()
    )


def test_what_does_not_fit_is_one_line(folder, command):
    for change, says in (
        (
            "student={kind: text_vae}",
            "objective: text_joint does not train a student of kind text_vae; allowed: text_joint",
        ),
        ("student.flow={kind: from_recipe, recipe: digits}", "flow: wants the settings of a network"),
        ("trainer.strategy=fsdp", "'fsdp' cannot shard"),
    ):
        code, _, err = command("fit", "--recipe", folder / "both.yaml", "--out", folder / "out", change)
        assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


def test_a_dry_run_says_that_nothing_is_missing(folder, command):
    code, out, err = command("fit", "--recipe", folder / "both.yaml", "--dry-run", "name=other")
    assert code == 0 and "nothing is missing" in out, err
