"""Sentences at tiny size: an autoencoder from a recipe, a flow in its latents, reflow, AYF, editing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import flowmap
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.recipe import read_recipe
from tests.conftest import no_runs
from tests.support.tiny_text import wordnet_files

VAE = """
name: words
data: {kind: text, sentences: {kind: wordnet, root: WORDNET}, tokenizer: {kind: bpe, vocab: 300, max_tokens: 12},
  held_out: 0.2, batch_size: 16,
  conditional: false}
student: {kind: text_vae, slots: 2, dims: 6, width: 48, depth: 1, heads: 2}
objective: {kind: text_elbo, kl: 0.01, free_bits: 0.0, anneal_steps: 50}
optimizer: {lr: 1.0e-2, schedule: cosine, warmup_steps: 10}
trainer: {steps: 150, accelerator: cpu}
log: {wandb: false, grid_images: 5}
"""
FLOW = """
data: {kind: text, sentences: {kind: wordnet, root: WORDNET}, autoencoder: {recipe: AUTOENCODER}, held_out: 0.2,
  batch_size: 16,
  attributes: [part_of_speech, length], drop_condition: 0.1, drop_attribute: 0.3}
student: {kind: dit, patch: 1, width: 16, depth: 1, heads: 2}
times: {kind: uniform}
objective: {kind: flow_matching}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 10, accelerator: cpu}
metrics: [{kind: frechet, features: pixels, images: 20}, {kind: control, images: 20}, {kind: distinct, images: 20},
  {kind: memorised, images: 20}]
evaluation: {batch_size: 10, teacher_steps: 2}
log: {wandb: false, grid_images: 4}
"""
QUIET = dict(log=lambda message: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, recipes, and runs: the autoencoder is trained."""
    folder = tmp_path_factory.mktemp("language")
    wordnet_files(folder / "wordnet")
    for name, text in (("words", VAE), ("flow", FLOW)):
        text = text.replace("WORDNET", str(folder / "wordnet")).replace("AUTOENCODER", str(folder / "words.yaml"))
        (folder / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMAP_RUNS", str(folder / "runs"))
        flowmap.fit(read_recipe(folder / "words.yaml"), **QUIET)
        flowmap.fit(read_recipe(folder / "flow.yaml", ["name=flow"]), **QUIET)
    return folder


@pytest.fixture
def runs(place, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(place / "runs"))
    return place / "runs"


def test_the_autoencoder_learns_and_its_folder_is_whole(runs):
    figures = json.loads((runs / "words" / "metrics.json").read_text())
    assert no_runs(runs / "words") == no_runs(runs / "flow") == set()
    row = figures["student"]["1"]
    assert row["token_accuracy"] > 0.1 and set(row) == {
        "exact",
        "word_accuracy",
        "token_accuracy",
        "nll_per_token",
        "kl",
        "active",
    }
    assert figures["sentences"]["train"] + figures["sentences"]["held_out"] + figures["sentences"]["shared"] == 80
    assert len((runs / "words" / "samples" / "step-00000150.txt").read_text().splitlines()) == 10
    coder = TextAutoencoder(source=str(runs / "words")).load()
    texts = [f"{word} again as n" for word in ("cat", "dog", "eel")]
    z, again = coder.encode(texts), coder.decode(coder.encode(texts))
    assert z.shape == (3, 6, 1, 2) and len(again) == 3 and all(isinstance(one, str) for one in again)
    everything = coder.encode(
        [line.split(" | ")[1] for line in (runs.parent / "wordnet" / "data.noun").read_text().splitlines()[1:]]
    )
    assert abs(float(everything.std()) - 1) < 0.5
    data = read_recipe(runs.parent / "words.yaml").data.build()
    rate = sum(a == b for a, b in zip(data.texts, coder.decode(coder.encode(data.texts)), strict=True)) / len(data)
    assert rate > 0.5, rate  # of what it was trained on
    torch.testing.assert_close(coder.encode(texts, batch_size=2), z)


def test_a_flow_gives_sentences_and_its_folder_stands_alone(runs, tmp_path):
    alone = shutil.copytree(runs / "flow" / "student", tmp_path / "alone")
    student = flowmap.load_student(alone)
    texts = student.sample(5, steps=2, cond={"part_of_speech": "verb", "length": 4}, seed=3)
    assert len(texts) == 5 and all(isinstance(one, str) for one in texts)
    assert texts == student.sample(5, steps=2, cond={"part_of_speech": ["verb"] * 5, "length": [4] * 5}, seed=3)
    latents = student.sample(5, steps=2, cond={"part_of_speech": "verb", "length": 4}, seed=3, latents=True)
    assert latents.shape == (5, 6, 1, 2) and student.sentences(latents) == texts
    assert not torch.equal(latents, student.sample(5, steps=2, cond={"part_of_speech": "noun"}, seed=3, latents=True))
    figures = json.loads((runs / "flow" / "metrics.json").read_text())
    assert {"frechet_pixels", "distinct_2", "copied", "length_within", "part_of_speech_hit"} <= set(
        figures["student"]["2"]
    )
    assert figures["floor"]["length_within"] == 1 and figures["floor"]["copied"] == 0


def test_the_command_line_writes_sentences(runs, tmp_path, command):
    asked = ("--num", 3, "--attribute", "part_of_speech=noun", "length=3", "--out", tmp_path)
    code, out, err = command("sample", "--student", runs / "flow", "--steps", 1, 2, *asked)
    assert code == 0, err
    assert len((tmp_path / "steps-2.txt").read_text(encoding="utf-8").split("\n")) == 4
    code, out, err = command("fit", "--recipe", runs.parent / "flow.yaml", "--dry-run", "name=other")
    assert code == 0 and "samples of shape (6, 1, 2)" in out and "nothing is missing" in out, err


@pytest.mark.parametrize(
    ("cond", "says"),
    [
        (
            {"part_of_speech": "pronoun"},
            "part_of_speech: 'pronoun' was never seen; allowed: adjective, adverb, noun, verb",
        ),
        ({"part_of_speech": 7}, "part_of_speech: 7 was never seen"),
        ({"length": 0}, "length: 0 was never seen; allowed: 1 to 6 words"),
        ({"length": 99}, "length: 99 was never seen; allowed: 1 to 6 words"),
        ({"length": 2.5}, "length: 2.5 was never seen"),
        ({"length": torch.tensor([1.0, 2.0, 3.0])}, "length: wants 3 whole numbers"),
        ({"part_of_speech": None}, "part_of_speech: None was never seen"),
        ({"length": [3, 4]}, "length: 2 values given; allowed: one, or 3"),
        ({"colour": "red"}, "'colour' is no condition of this student; allowed: part_of_speech, length"),
        ({"class": 1}, "'class' is no condition"),
    ],
)
def test_conditions_that_are_not_known(runs, cond, says):
    with pytest.raises(ValueError, match=".") as caught:
        flowmap.load_student(runs / "flow").sample(3, cond=cond)
    assert says in str(caught.value)


def test_latents_are_made_once_and_are_those_of_their_autoencoder(runs, monkeypatch):
    from flowmap.build.data import build_data
    from flowmap.plan.plan import resolve

    recipe = read_recipe(runs.parent / "flow.yaml")
    run = resolve(recipe)
    first, files = build_data(run), sorted((runs / "text-latents").iterdir())
    monkeypatch.setattr("flowmap.data.text.autoencoder.FrozenTextAutoencoder.encode", None)
    assert torch.equal(build_data(run).train, first.train) and build_data(run).counts == first.counts
    assert first.counts["shared"] > 0 and sorted((runs / "text-latents").iterdir()) == files
    monkeypatch.setattr("flowmap.data.text.autoencoder.TextAutoencoder.identity", lambda self: {"weights": "others"})
    with pytest.raises(TypeError):
        build_data(run)  # another encoder: its latents are not these


def test_reflow_and_ayf_are_ordinary_recipes(runs):
    flow = runs.parent / "flow.yaml"
    teacher = f"{{recipe: {flow}, guidance: {{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}}}}"
    ayf = [
        f"teacher={teacher}",
        "student={kind: from_teacher}",
        "objective={kind: ayf_emd, warmup_steps: 2}",
        "times={kind: interval}",
    ]
    run = flowmap.fit(read_recipe(flow, ["name=ayf", "trainer.steps=4", *ayf]), **QUIET)
    assert len(run.student.sample(3, cond={"length": 2}, guidance=1.0)) == 3 and "teacher" in run.metrics
    (drawn,) = (run.folder / "samples").glob("*.txt")
    assert [line for line in drawn.read_text().splitlines() if line[:1] == "#"] == [
        "# 1 step",
        "# 2 steps",
        "# teacher",
    ]
    pairs = f"coupling={{kind: pairs, teacher: {{recipe: {flow}}}, num: 30, solver: {{kind: heun, steps: 2}}}}"
    reflow = [pairs, f"student={{kind: from_recipe, recipe: {flow}}}"]
    run = flowmap.fit(
        read_recipe(flow, ["name=reflow", *reflow, "objective={kind: rectified}", "trainer.steps=4"]), **QUIET
    )
    assert len(run.student.sample(3)) == 3


@pytest.fixture(scope="module")
def editor(place):
    """A finished run that edits."""
    styles = "coupling={kind: styles, source: [part_of_speech=noun], target: [part_of_speech=verb]}"
    metrics = "metrics=[{kind: style_hit, images: 10}, {kind: distinct, images: 10}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMAP_RUNS", str(place / "runs"))
        changes = ["name=edit", styles, metrics, "data.conditional=false", "trainer.steps=4"]
        return flowmap.fit(read_recipe(place / "flow.yaml", changes), **QUIET)


def test_editing_starts_from_sentences_both_ways(runs, editor):
    run = editor
    student, texts = run.student, ["cat again as n", "to say dog and fox n"]
    edited, back = student.edit(texts, steps=2), student.edit(texts, steps=2, reverse=True)
    assert len(edited) == len(back) == 2 and "style_hit" in run.metrics["student"]["1"]
    assert student.config.edits == ("part_of_speech=noun", "part_of_speech=verb")
    for call, says in (
        (lambda: student.sample(3), "use edit"),
        (lambda: student.edit([]), "one or more sentences"),
        (lambda: student.edit(["a", " "]), "none of them empty"),
        (lambda: student.edit("abc"), "texts: 'abc' is no list of sentences"),
        (lambda: student.edit(3), "texts: 3 is no list of sentences"),
        (lambda: flowmap.load_student(runs / "flow").edit(texts), "starts from noise.*use sample"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.warns(UserWarning, match="^texts: 1 of 2 are longer than the decoder's 12 tokens and were cut") as told:
        student.edit(["cat again", "to say " * 30])
    assert told[0].filename == __file__


@pytest.fixture
def edit_lines(editor, tmp_path, command):
    """edit_lines(content, *options) -> (exit code, lines of steps-1.txt if there are any, stderr) of `sample`."""

    def call(content, *options, student=None):
        (tmp_path / "in.txt").write_bytes(content)
        given = (
            "--student",
            student or editor.folder,
            "--texts",
            tmp_path / "in.txt",
            "--out",
            tmp_path / "out",
            *options,
        )
        code, _, err = command("sample", *given)
        made = tmp_path / "out" / "steps-1.txt"
        return code, made.read_text().split("\n") if made.is_file() else None, err

    return call


def test_a_file_is_edited_line_by_line(editor, edit_lines):
    code, lines, err = edit_lines(b"\ncat again as n\n \nto say dog and fox n\n", "--steps", 1, 2)
    one, other = (
        " ".join(text.splitlines()) for text in editor.student.edit(["cat again as n", "to say dog and fox n"])
    )
    assert code == 0 and lines == ["", one, "", other, ""]
    assert err.splitlines() == ["flowmap: warning: --texts: 2 of 4 lines are empty, and stay so"]
    code, _, err = edit_lines(b"cat again\n" + b"to say " * 30 + b"\n", "--steps", 1, 2)
    assert code == 0 and err.splitlines() == [
        "flowmap: warning: --texts: 1 of 2 are longer than the decoder's 12 tokens and were cut"
    ]
    code, lines, err = edit_lines(b"cat again as n\n", "--steps", 1, "--reverse")
    assert (
        code == 0
        and lines[0] == " ".join(editor.student.edit(["cat again as n"], reverse=True)[0].splitlines())
        and not err
    )


def test_what_a_file_cannot_be_edited_with_is_one_line(runs, editor, edit_lines, tmp_path, command):
    for content, options, says in (
        (b"cat\n", ("--solver", "heun"), "--solver: does not go with --texts"),
        (b"cat\n", ("--num", "8"), "--num: does not go with --texts"),
        (b"cat\n", ("--steps", 1, 0), "--steps: 0 must be 1 or more"),
        (b"\xff\n", (), "is not UTF-8"),
        (b"\n \n", (), "has no sentence"),
    ):
        code, lines, err = edit_lines(content, *options)
        assert code == 2 and lines is None and says in err and len(err.splitlines()) == 1
    for reverse in ((), ("--reverse",)):
        code, _, err = edit_lines(b"cat\n", *reverse, student=runs / "flow")
        assert code == 2 and "--texts: this student starts from noise, not from sentences; leave it out" in err
    code, _, err = command("sample", "--student", editor.folder, "--out", tmp_path)
    assert (
        code == 2
        and "--texts: is required: this student carries sentences of part_of_speech=noun to part_of_speech=verb" in err
    )
    code, _, err = command("sample", "--student", runs / "flow", "--reverse", "--out", tmp_path)
    assert code == 2 and "--reverse: goes with --texts, for students that edit sentences" in err


def test_an_editing_flow_is_reflowed_from_its_own_pairs(runs):
    """x1 are latents of the source, x0 where the editing flow carries them, and the result edits as it does."""
    from flowmap.build.data import build_data, build_samples
    from flowmap.build.teacher import build_teacher
    from flowmap.plan.plan import resolve
    from flowmap.prepare.make_pairs import verify

    styles = "coupling={kind: styles, source: [part_of_speech=noun], target: [part_of_speech=verb]}"
    path, plain = runs.parent / "edited.yaml", ["metrics=[]", "data.conditional=false", "trainer.steps=4"]
    path.write_text(read_recipe(runs.parent / "flow.yaml", ["name=edited", styles, *plain]).to_yaml())
    pairs = f"coupling={{kind: pairs, recipe: {path}, num: 30, solver: {{kind: heun, steps: 2}}, shard_items: 8}}"
    again = [
        pairs,
        f"student={{kind: from_recipe, recipe: {path}}}",
        "objective={kind: rectified}",
        "times={kind: u_shaped}",
    ]
    recipe = read_recipe(path, ["name=edited-again", *again])
    run = flowmap.fit(recipe, **QUIET)
    assert (
        run.student.config.edits == ("part_of_speech=noun", "part_of_speech=verb")
        and len(run.student.edit(["cat again as n"])) == 1
    )
    assert verify(resolve(recipe), num=30) == (0, 0)
    data = build_data(resolve(recipe))
    x0, _, x1 = build_samples(resolve(recipe), data).__getitems__(range(30))
    rows = {tuple(row.flatten().tolist()) for row in data.sources}
    assert {tuple(row.flatten().tolist()) for row in x1} <= rows and len(
        {tuple(row.flatten().tolist()) for row in x1}
    ) == min(30, len(rows))
    taught = build_teacher(
        resolve(read_recipe(path, [f"teacher={{recipe: {path}}}", "student={kind: from_teacher}"])), data
    )
    from flowmap.flow.solver import Heun

    torch.testing.assert_close(
        x0, Heun(steps=2)(lambda x, t: taught.guided.velocity(x, t, None), x1).x, atol=2e-3, rtol=2e-3
    )  # kept as float16
    with pytest.raises(flowmap.recipe.recipe.RecipeError, match="coupling.inverted: an editing flow"):
        flowmap.fit(read_recipe(path, ["name=inverted", *again, "coupling.inverted=0.5"]), **QUIET)


def test_an_autoencoder_is_no_student_and_one_that_is_not_there_is_named(runs, tmp_path, command):
    code, out, err = command("sample", "--student", runs / "words", "--num", 4, "--out", tmp_path / "drawn")
    assert code == 2 and "is an autoencoder's, not a student's" in err
    with pytest.raises(ValueError, match="has no text autoencoder yet; `flowmap fit`"):
        TextAutoencoder(source=str(tmp_path / "nowhere")).load()
    for plain in ({}, {"source": "a", "recipe": "b"}):
        with pytest.raises(ValueError, match="exactly one of source"):
            TextAutoencoder(**plain)


def test_the_same_recipe_gives_the_same_bits(runs, tmp_path):
    """The posterior's noise and the dropped words are functions of the step's draw."""
    from safetensors.torch import load_file

    short = ["trainer.steps=6", "objective.word_dropout=0.3", "name=short"]
    one = flowmap.fit(read_recipe(runs.parent / "words.yaml", short), tmp_path / "one", **QUIET).folder
    two = flowmap.fit(read_recipe(runs.parent / "words.yaml", short), tmp_path / "two", **QUIET).folder
    a, b = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_sentences_are_not_exported_to_a_pipeline(runs, tmp_path, command):
    code, out, err = command("export", "--student", runs / "flow", "--out", tmp_path / "out")
    assert code == 2 and "its samples are sentences" in err


def test_infilling_is_given_what_stands_around(runs):
    infill = [
        "data.infill=true",
        "data.attributes=[]",
        "metrics=[{kind: distinct, images: 10}]",
        "trainer.steps=4",
        "student={kind: mlp, width: 8}",
    ]
    student = flowmap.fit(read_recipe(runs.parent / "flow.yaml", ["name=infill", *infill]), **QUIET).student
    one, other = (
        student.sample(2, cond={"left": "to say", "right": right}, latents=True) for right in ("fox n", "hen v")
    )
    assert not torch.equal(one, other) and student.config.sentences.contexts == ("left", "right")
    with pytest.raises(ValueError, match="left: 3 given; allowed: one text, or 2 texts"):
        student.sample(2, cond={"left": ["a"] * 3})
    with pytest.raises(ValueError, match="left: 3 was given; allowed: one text, or 2 texts"):
        student.sample(2, cond={"left": 3})
    with pytest.warns(UserWarning, match="left: 1 of 2 are longer than the decoder's 12 tokens and were cut") as told:
        cut = student.sample(3, cond={"left": ["to say", "to say " * 30, "to say"]}, latents=True)
    assert told[0].filename == __file__ and cut.shape == (3, 6, 1, 2)
    torch.testing.assert_close(student.sample(3, cond={"left": "to say"}, latents=True)[::2], cut[::2])


def test_a_tokenizer_that_does_not_fit_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs / "words" / "student", tmp_path / "spoilt")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model["model"]["merges"] = model["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(model), encoding="utf-8")
    with pytest.raises(ValueError, match="is not the tokenizer that this decoder was trained with"):
        TextAutoencoder(source=str(folder)).load()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: there is no such file"):
        TextAutoencoder(source=str(folder)).load()


@pytest.mark.parametrize(
    ("recipe", "change", "says"),
    [
        ("words", "student.vocab=200", "student.vocab: 200 is smaller than the tokenizer's"),
        (
            "words",
            "objective={kind: flow_matching}",
            "flow_matching does not train a student of kind text_vae; allowed: ",
        ),
        ("flow", "data.attributes=[colour]", "'colour' is no attribute"),
        ("flow", "data.autoencoder=null", "data.autoencoder: is required"),
        ("flow", "data.tokenizer={kind: bpe}", "tokenizer: the text autoencoder brings its own"),
        ("flow", "student={kind: edm_ddpmpp}", "a network of kind edm_ddpmpp takes no condition "),
        (
            "flow",
            "coupling={kind: styles, source: [length=4], target: [part_of_speech=pronoun]}",
            "coupling.target: part_of_speech: 'pronoun'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(runs, tmp_path, command, recipe, change, says):
    code, out, err = command("fit", "--recipe", runs.parent / f"{recipe}.yaml", "--out", tmp_path / "run", change)
    assert code == 2 and says in err and len(err.strip().splitlines()[-1:]) == 1, err
