"""The page of a student: its columns start from the same noise, and a mistake of its visitor is one line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowmap.evaluation.columns import load_teacher
from flowmap.evaluation.demo import ALL, NONE, cost, open_demo, shown
from flowmap.evaluation.demo_page import page
from flowmap.student.config import TextLatents
from tests.support.browser import browser, free_port
from tests.support.straight_page import NAMES, ends, straight_demo, straight_student


def test_all_columns_end_where_the_lines_from_the_same_noise_end():
    demo = straight_demo()
    found = demo.draw(seed=3, num=5)
    assert [one.label for one in found] == demo.labels == [
        "student, 1 step", "student, 2 steps", "student, 4 steps", "teacher, 8 steps",
    ]  # fmt: skip
    assert [one.calls for one in found] == [1, 2, 4, 8] and all(one.seconds > 0 for one in found)
    for one in found:
        torch.testing.assert_close(one.samples, ends(5, seed=3), atol=1e-5, rtol=0)  # float32, eight additions


def test_a_seed_gives_the_same_samples_and_another_seed_others():
    demo = straight_demo()
    first, again, other = (demo.draw(seed=seed, num=5) for seed in (1, 1, 2))
    assert all(torch.equal(one.samples, two.samples) for one, two in zip(first, again, strict=True))
    assert not any(torch.allclose(one.samples, two.samples) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("given, expected", [("square", [1] * 5), ("2", [2] * 5), (ALL, [0, 1, 2, 0, 1])])
def test_student_and_teacher_have_the_same_class_and_scale(given, expected):
    demo = straight_demo(num_classes=3, class_names=NAMES, guidance=(1.0, 3.0, 2.0))
    assert demo.classes == [ALL, *NAMES]
    demo.draw(num=5, label=given, guidance=1.5)
    for network in (demo.student.flow_map, demo.teacher.built.guided):
        assert all(cond["class"].tolist() == expected for cond in network.seen)
        assert all(cond["guidance"].tolist() == [1.5] * 5 for cond in network.seen)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"label": "sqare"}, "no class 'sqare', did you mean 'square'"),
        ({"label": "7"}, "7 is not one of 0..2"),
        ({"num": 0}, "num: 0 must lie in 1..64"),
        ({"seed": 2**70}, "seed"),
        ({"guidance": -1.0}, "guidance"),
    ],
)
def test_a_mistake_is_named(given, words):
    demo = straight_demo(num_classes=3, class_names=NAMES, guidance=(1.0, 3.0, 2.0))
    with pytest.raises(ValueError, match=words):
        demo.draw(**given)


def test_an_empty_prompt_is_named():
    demo = straight_demo()
    object.__setattr__(demo.student.config, "text", object())
    with pytest.raises(ValueError, match="prompt: is empty"):
        demo.draw(prompt=" ")


def test_a_picture_of_a_column_and_what_it_cost():
    column = replace(straight_demo().draw(num=5)[1], seconds=0.25)
    assert shown(column).size == (4 * 50, 2 * 34), "48 x 32 pixels and a gap of two, four in a row"
    assert cost(column) == "0.25 s, 2 network calls a sample"
    assert shown(replace(column, samples=["one\ntwo", "three"])) == "one two\nthree"


def test_the_teacher_is_that_of_the_recipe_or_of_a_folder(finished):
    lines: list[str] = []
    demo = open_demo(finished, steps=(1,), log=lines.append)
    assert demo.labels == ["student, 1 step", "teacher, 4 steps"] and not lines
    student, teacher = demo.draw(seed=1)
    assert student.samples.shape == teacher.samples.shape == (4096, 2) and shown(teacher).size == (256, 256)
    assert load_teacher(demo.student, finished, steps=2).label == "teacher, 2 steps"
    assert open_demo(finished, teacher=False).labels[-1] == "student, 4 steps"
    (finished / "student" / "recipe.yaml").unlink()
    assert len(open_demo(finished, log=lines.append).labels) == 3 and "no recipe.yaml" in lines[0]
    with pytest.raises(ValueError, match="--teacher-steps: 0"):
        load_teacher(demo.student, finished, steps=0)


def test_a_student_of_sentences_takes_its_attributes():
    lines: list[str] = []
    demo = open_demo(Path(__file__).parents[1] / "recorded" / "kept" / "language", steps=(2,), log=lines.append)
    assert "has no teacher" in lines[0] and demo.sentences and demo.classes == []
    (column,) = demo.draw(seed=1, num=3, attributes=["noun", NONE])
    expected = demo.student.sample(3, steps=2, cond={"part_of_speech": "noun"}, seed=1)
    assert column.samples == expected and len(shown(column).splitlines()) == 3
    with pytest.raises(ValueError, match="part_of_speech: 'nown'"):
        demo.draw(attributes=["nown"])


def test_a_teacher_of_another_shape_is_refused(finished):
    with pytest.raises(ValueError, match=r"--teacher: .* has samples of shape \(2,\), the student of \(3, 4, 6\)"):
        load_teacher(straight_student(), finished)


def test_a_student_that_edits_sentences_is_refused():
    student = straight_student()
    object.__setattr__(student.config, "samples", TextLatents(edits=("formal", "plain")))
    with pytest.raises(ValueError, match="--texts"):
        open_demo(student, teacher=False)


def test_the_command_names_what_is_missing(command, finished, monkeypatch):
    code, _, err = command("demo", "--student", finished, "--no-teacher", "--teacher-steps", 3)
    assert code == 2 and "--no-teacher: excludes" in err
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = command("demo", "--student", finished)
    assert code == 2 and err == "flowmap: demo: needs gradio: pip install 'flowmap-distillation[demo]'\n"


@pytest.fixture
def served():
    """The address of a served page, and its demo."""
    pytest.importorskip("gradio")
    demo = straight_demo(num_classes=3, class_names=NAMES)
    blocks = page(demo)
    where = dict(server_name="127.0.0.1", server_port=free_port(), share=False, quiet=True)
    _, address, _ = blocks.launch(**where, prevent_thread_lock=True)
    yield address, demo
    blocks.close()


def test_the_served_page_draws(served):
    from gradio_client import Client
    from PIL import Image, ImageChops

    address, demo = served
    client = Client(address, verbose=False)
    drawn = client.predict(seed=3, num=5, label="square", api_name="/draw")
    assert [one.split("**")[1] for one in drawn[::2]] == demo.labels
    expected = shown(demo.draw(seed=3, num=5, label="square")[0]).convert("RGB")
    for path in drawn[1::2]:
        with Image.open(path) as picture:
            difference = ImageChops.difference(picture.convert("RGB"), expected)
        assert max(most for _, most in difference.getextrema()) <= 1, "float32: rounding to a pixel's value may differ"
    with pytest.raises(Exception, match="seed"):
        client.predict(seed=2**70, num=5, label="square", api_name="/draw")


@pytest.mark.slow
def test_a_visitor_draws_in_a_browser(served, tmp_path):
    address, demo = served
    with browser() as chromium:
        chromium.open(address)
        pictures = "[...document.querySelectorAll('img')].filter(one => one.naturalWidth == 200).length"
        chromium.wait_for(f"{pictures} == {len(demo.labels)}")  # the page draws once when it is opened
        assert all(one in chromium.run("return document.body.innerText") for one in demo.labels)
        chromium.run("[...document.querySelectorAll('button')].find(one => one.innerText == 'Draw').click()")
        chromium.wait_for(f"{pictures} == {len(demo.labels)}")
        chromium.picture(tmp_path / "page.png")
