"""Samples as files: for every number of steps a grid and the single pictures, all from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowmap.pictures import save_picture, to_grid, to_picture
from flowmap.student import Student, load_student


def sample(
    student: str | Path | Student,
    out: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4),
    num: int = 64,
    cond: dict | None = None,
    guidance: float | None = None,
    gamma: float | None = None,
    seed: int = 0,
    progress=None,
    refine=None,
) -> list[Path]:
    """Writes out/steps-K.png (a grid) and out/steps-K/NNNNN.png for every K, and returns the grids' paths. Points are written as text.

    refine: as Student.sample has it.
    """
    student = student if isinstance(student, Student) else load_student(student)
    for k in steps:
        if k < 1:
            raise ValueError(f"steps: {k} must be 1 or more")
    grids = []
    for k in steps:
        x0 = student.sample(num, steps=k, cond=cond, guidance=guidance, gamma=gamma, seed=seed, progress=progress, refine=refine)
        grids.append(Path(out) / f"steps-{k}.png")
        save_picture(grids[-1], to_grid(x0))
        if x0.ndim == 4:
            for i, one in enumerate(x0):
                save_picture(Path(out) / f"steps-{k}" / f"{i:05d}.png", to_picture(one))
        else:
            from flowmap.files import write_text

            write_text(Path(out) / f"steps-{k}.csv", "\n".join(",".join(f"{v:.6g}" for v in row) for row in x0.flatten(1).tolist()) + "\n")
    return grids
