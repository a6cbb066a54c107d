"""What do samples look like?  Draws the teacher at 64 steps above its student at 4, 2 and 1, from the same noise.

`python benchmarks/picture.py RUN [RUN ...] [--columns 6] [--out docs/images/teacher_and_student.png]`, with RUN the
folder of a finished run.  The runs of the teachers are searched in $FLOWMAP_RUNS, or runs/.  Several runs are drawn
next to each other.  Classes come in turn; nothing is selected.  Pictures are enlarged by bicubic interpolation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowmap.base.images import save_picture, stack, steps_label, to_grid
from flowmap.build.data import build_data
from flowmap.build.teacher import build_teacher
from flowmap.evaluation.conditions import conditions_for
from flowmap.plan.plan import resolve
from flowmap.recipe import read_resolved
from flowmap.student.folder import load_student

STEPS, SEED, SIDE = (4, 2, 1), 3, 64


@torch.no_grad()
def rows(run: Path, columns: int) -> dict[str, Tensor]:
    """Pictures (columns, C, H, W) by the label of their row."""
    recipe = read_resolved(run / "recipe.yaml")
    data, student = build_data(resolve(recipe)), load_student(run / "student")
    teacher = build_teacher(resolve(recipe), data)
    cond = conditions_for(student, data, columns)(torch.arange(columns))
    x1 = student.start(columns, torch.Generator().manual_seed(SEED)).x1

    def by_teacher(steps: int) -> Tensor:
        return student.pictures(teacher.solve(x1, cond, steps))

    many = recipe.evaluation.teacher_steps
    found = {steps_label("teacher", many): by_teacher(many)}
    found |= {steps_label("student", k): student.sample(columns, steps=k, cond=cond, seed=SEED) for k in STEPS}
    return found | {steps_label("teacher", k): by_teacher(k) for k in STEPS[1:]}


def enlarged(x: Tensor) -> Tensor:
    """The pictures, SIDE pixels wide."""
    return torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic").clamp(-1, 1)


def side_by_side(grids: list[Image.Image], gap: int = 16) -> Image.Image:
    sheet = Image.new("RGB", (sum(g.width + gap for g in grids) - gap, grids[0].height), (255,) * 3)
    left = 0
    for grid in grids:
        sheet.paste(grid, (left, 0))
        left += grid.width + gap
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("docs/images/teacher_and_student.png"))
    given = parser.parse_args()
    lines: dict[str, list[Image.Image]] = {}
    for run in given.runs:
        for label, pictures in rows(run, given.columns).items():
            lines.setdefault(label, []).append(to_grid(enlarged(pictures), columns=given.columns))
    save_picture(given.out, stack([side_by_side(grids) for grids in lines.values()], list(lines)))


if __name__ == "__main__":
    main()
