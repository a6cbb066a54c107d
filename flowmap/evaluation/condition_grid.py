"""One picture of a student: a row for each prompt or class, a column for each number of steps and one for the teacher.

All columns of a row have the same noise and the same condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowmap.base.images import labelled_grid, save_picture, to_tiles
from flowmap.data.prompts import read_prompts
from flowmap.evaluation.columns import LoadedTeacher, columns
from flowmap.evaluation.conditions import class_label
from flowmap.student.student import Student

MOST = 64  # rows
CLASSES = 10  # rows of a student of classes, if there are as many
LEAST = 64  # pixels of a picture's width, at least


def condition_grid(
    student: Student,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    num: int | None = None,
    steps: Sequence[int] = (1, 2, 4),
    guidance: float | None = None,
    seed: int = 0,
    teacher: LoadedTeacher | None = None,
) -> Path:
    """Write out/grid.png and return its path.

    prompts: one for each row, for a student that is conditioned on text; otherwise `num` rows have each class in turn.
    Raises ValueError for a user's mistake.
    """
    check_grid(student, prompts, num)
    cond, labels = _conditions(student, prompts, num)
    found = columns(student, teacher, num=len(labels), steps=steps, cond=cond, guidance=guidance, seed=seed)
    cells = [to_tiles(torch.as_tensor(column.samples).float(), least=LEAST) for column in found]
    path = Path(out) / "grid.png"
    save_picture(path, labelled_grid([*zip(*cells, strict=True)], labels, [column.label for column in found]))
    return path


def check_grid(student: Student, prompts: Sequence[str] | None, num: int | None) -> None:
    """Raise ValueError for what cannot be drawn as a grid of pictures."""
    config = student.config
    if config.text_autoencoder is not None or len(config.shape) != 3:
        raise ValueError("--grid: is of pictures, and this student's samples are none")
    if config.text is not None and prompts is None:
        raise ValueError("--grid: this student is conditioned on text; give --prompts FILE, a prompt a line")
    if prompts is not None and num is not None:
        raise ValueError("--num: the prompts give the number of rows; leave it out")
    rows = len(prompts) if prompts is not None else 1 if num is None else num
    if not 1 <= rows <= MOST:
        raise ValueError(f"--grid: {rows} rows; a grid has 1 to {MOST}")


def prompts_in(path: str) -> list[str]:
    """The prompts of a file: one a line, or COCO's captions_*.json (data/prompts.py)."""
    try:
        return read_prompts(path)
    except ValueError as error:
        raise ValueError(f"--prompts: {error}") from error


def _conditions(student: Student, prompts: Sequence[str] | None, num: int | None) -> tuple[dict[str, Any], list[str]]:
    """The conditions of the rows, and their labels."""
    config = student.config
    if prompts is not None:
        return {"prompt": list(prompts)}, list(prompts)
    classes = config.num_classes
    rows = num or (min(classes, CLASSES) if classes else 8)
    if not classes:
        return {}, [f"noise {i}" for i in range(rows)]
    labels = [i % classes for i in range(rows)]
    return {"class": labels}, [class_label(config, i) for i in labels]
