"""Samples that are watched during a run: the same noise and conditions each time, as rows that can be compared."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from flowmap.data.dataset import Dataset
from flowmap.evaluation.fixed_samples import FixedSamples, cells_of, sample_table
from flowmap.recipe.recipe import read_recipe
from tests.support.straight_page import NAMES, ends, straight_demo

SETTINGS = ("log.grid_images=5", "evaluation.seed=3", "evaluation.teacher_steps=4")


def watched(**student):
    demo = straight_demo(**student)
    data = Dataset("few", torch.zeros(6, *demo.student.config.shape), torch.zeros(0, *demo.student.config.shape))
    return demo, FixedSamples(read_recipe("digits", SETTINGS), demo.student, data)


def test_student_and_teacher_end_where_the_lines_from_the_same_noise_end():
    demo, fixed = watched()
    for _ in range(2):
        torch.rand(7)  # other draws between two evaluations
        cond = fixed.conditions()
        for samples in (
            fixed.of_student(1, cond),
            fixed.of_student(2, cond),
            fixed.of_teacher(demo.teacher.built, cond),
        ):
            torch.testing.assert_close(samples, ends(5, seed=3), atol=1e-5, rtol=0)  # float32, four additions


def test_the_teacher_is_solved_in_batches_of_the_evaluation():
    demo, fixed = watched(num_classes=3, class_names=NAMES)
    fixed.recipe = fixed.recipe.changed(evaluation=replace(fixed.recipe.evaluation, batch_size=2))
    samples = fixed.of_teacher(demo.teacher.built, fixed.conditions())
    torch.testing.assert_close(samples, ends(5, seed=3), atol=1e-5, rtol=0)  # float32, four additions
    classes = [cond["class"].tolist() for cond in demo.teacher.built.guided.seen]
    assert classes[::4] == [[0, 1], [2, 0], [1]]


def test_rows_have_step_seed_class_and_one_picture_a_column():
    _, fixed = watched(num_classes=3, class_names=NAMES)
    cond = fixed.conditions()
    cells = {"1 step": cells_of(fixed.of_student(1, cond), 4), "teacher": cells_of(ends(5, seed=3), 4)}
    table = sample_table(fixed, cond, cells)
    rows = table.rows(120)
    assert table.columns == ["step", "seed", "sample", "condition", "1 step", "teacher"]
    assert [row[:4] for row in rows] == [[120, 3, i, NAMES[i % 3]] for i in range(4)]
    assert all(isinstance(cell, Image.Image) and cell.width >= 48 for row in rows for cell in row[4:])
    assert [row[4].tobytes() for row in rows] == [row[5].tobytes() for row in rows]
    assert table.rows(240)[1][4].tobytes() == rows[1][4].tobytes() != rows[0][4].tobytes()


def test_sentences_are_one_line_and_points_one_density():
    assert cells_of(["a\nb", "c", "d"], 2) == ["a b", "c"]
    (cell,) = cells_of(torch.zeros(9, 2), 4)
    assert isinstance(cell, Image.Image)
