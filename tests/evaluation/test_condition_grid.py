"""One picture with a row for each prompt or class and a column for each number of steps, all from the row's noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from flowmap.base.images import labelled_grid, to_tiles
from flowmap.base.schema import RecipeError
from flowmap.evaluation.columns import solved, teacher_or_none
from flowmap.evaluation.condition_grid import _conditions, condition_grid, prompts_in
from flowmap.recipe import read_recipe
from flowmap.student.config import TextLatents
from tests.support.coco import Lengths
from tests.support.straight_page import NAMES, ends, straight_demo


def with_text():
    demo = straight_demo()
    demo.student.config = replace(demo.student.config, text=Lengths())
    return demo


def cells(path, rows, columns, size):
    """The pictures of the grid, found from its lower right corner, where margins are known."""
    sheet = Image.open(path).convert("RGB")
    (width, height), gap = size, 8
    left = sheet.width - columns * (width + gap)
    tops = [sheet.height - (rows - i) * (height + gap) for i in range(rows)]
    return [[sheet.crop((x, y, x + width, y + height)) for x in range(left, sheet.width, width + gap)] for y in tops]


def same(one, other):
    return max(most for _, most in ImageChops.difference(one, other.convert("RGB")).getextrema()) <= 1


def test_a_row_for_each_prompt_from_its_noise(tmp_path):
    demo = with_text()
    prompts = ["a cat", "a brown dog", "x"]
    path = condition_grid(demo.student, tmp_path, prompts=prompts, steps=(1, 2), seed=3, teacher=demo.teacher)
    wanted = to_tiles(ends(3, seed=3), least=64)
    size = wanted[0].size
    rows = cells(path, 3, 3, size)
    assert all(same(cell, wanted[i]) for i, row in enumerate(rows) for cell in row)
    for network in (demo.student.flow_map, demo.teacher.built.guided):
        assert all(cond["text"].flatten().tolist() == [float(len(one)) for one in prompts] for cond in network.seen)


def test_classes_are_in_turn_and_no_more_than_asked_for(tmp_path):
    demo = straight_demo(num_classes=3, class_names=NAMES)
    condition_grid(demo.student, tmp_path, num=5, steps=(1,))
    assert demo.student.flow_map.seen[-1]["class"].tolist() == [0, 1, 2, 0, 1]
    condition_grid(demo.student, tmp_path, steps=(1,))
    assert demo.student.flow_map.seen[-1]["class"].tolist() == [0, 1, 2]


def test_a_class_without_a_name_is_labelled_by_its_number():
    labels = lambda **more: _conditions(straight_demo(num_classes=3, **more).student, None, 4)[1]
    assert labels() == ["class 0", "class 1", "class 2", "class 0"]
    assert labels(class_names=NAMES) == [*NAMES, NAMES[0]]


def test_the_teacher_is_solved_in_batches_from_the_same_noise():
    demo = straight_demo(num_classes=3, class_names=NAMES)
    torch.testing.assert_close(
        solved(demo.student, demo.teacher, 5, None, None, 3, batch_size=2), ends(5, 3), atol=1e-5, rtol=0
    )  # float32, eight additions
    assert [len(cond["class"]) for cond in demo.teacher.built.guided.seen][::8] == [2, 2, 1]


def test_long_labels_make_a_row_taller_and_do_not_move_pictures():
    tile = Image.new("RGB", (40, 20), "black")
    short = labelled_grid([[tile, tile]], ["a"], ["one", "two"])
    tall = labelled_grid([[tile, tile], [tile, tile]], ["a", "many words " * 20], ["one", "two"])
    assert tall.height > short.height + 200 and tall.width > short.width
    assert tall.convert("L").getextrema() == (0, 255)


def test_what_is_no_grid_of_pictures_is_named(tmp_path):
    demo, text = straight_demo(), with_text()
    for student, options, says in (
        (demo.student, {"num": 65}, "65 rows; a grid has 1 to 64"),
        (text.student, {}, "give --prompts FILE"),
        (text.student, {"prompts": ["a"], "num": 2}, "--num: the prompts give"),
    ):
        with pytest.raises(ValueError, match=says):
            condition_grid(student, tmp_path, **options)
    demo.student.config = replace(demo.student.config, samples=TextLatents(), shape=(2,))
    with pytest.raises(ValueError, match="--grid: is of pictures"):
        condition_grid(demo.student, tmp_path)
    with pytest.raises(ValueError, match="--prompts: .*there is no such file"):
        prompts_in(str(tmp_path / "none.txt"))


def test_the_command_draws_the_grid_and_refuses_what_it_ignores(tmp_path, monkeypatch, command):
    from flowmap.student import folder

    demo = with_text()
    monkeypatch.setattr(folder, "load_student", lambda *_, **__: demo.student)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    words = ("sample", "--student", "any", "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    code, out, err = command(*words, "--grid", "--steps", 1, 2, "--out", tmp_path / "grid")
    assert code == 0 and out.strip() == str(tmp_path / "grid" / "grid.png") and "no teacher's column" in err
    code, out, err = command(*words, "--steps", 1, "--out", tmp_path / "all")
    assert code == 0 and len([*(tmp_path / "all" / "steps-1").iterdir()]) == 2, err
    for more, says in (
        (("--grid", "--gamma", 0.5), "--gamma: does not go with --grid"),
        (("--num", 3), "leave --prompt"),
        (("--grid", "--teacher-steps", 0), "--teacher-steps: 0 must be 1 or more"),
        (("--grid", "--gamma", 0), "--gamma: does not go with --grid"),
        (("--grid", "--tilt", "particles=2"), "--tilt: does not go with --grid"),
        (("--grid", "--attribute", "kind=a"), "--attribute: does not go with --grid"),
        (("--grid", "--negative-prompt", "x"), "--negative-prompt: does not go with --grid"),
        (("--grid", "--reverse"), "--reverse: does not go with --grid"),
        (("--teacher-steps", 4), "--teacher-steps: goes with --grid"),
        (("--no-teacher",), "--no-teacher: goes with --grid"),
    ):
        code, _, err = command(*words, *more, "--out", tmp_path / "no")
        assert code == 2 and says in err


def test_only_a_missing_teacher_is_left_out(monkeypatch, tmp_path):
    demo, lines = with_text(), []
    demo.student.folder = tmp_path
    (tmp_path / "recipe.yaml").write_text(read_recipe("sd15", ["data.images.root=pictures"]).to_yaml())

    def failing(error):
        def build(run):
            raise error

        monkeypatch.setattr("flowmap.evaluation.columns.build_teacher", build)

    failing(RecipeError("sd15: teacher: is not here"))
    assert teacher_or_none(demo.student, None, lines.append) is None
    assert lines == ["no teacher's column: sd15: teacher: is not here"]
    failing(ValueError("model.safetensors: is torn"))
    with pytest.raises(ValueError, match="is torn"):
        teacher_or_none(demo.student, None, lines.append)
