"""Samples as files: for every number of steps a grid and the single pictures, all from the same noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from flowmap.base.files import write_text
from flowmap.base.images import save_picture, stack, steps_label, to_grid, to_picture
from flowmap.base.precision import in_precision
from flowmap.data.safe_files import lines_of
from flowmap.data.text.sources import one_line
from flowmap.flow.reward import Reward
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.samplers import Tilted
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.student.text import edit

BATCH = 256  # samples that are drawn at once, at most


def _edited(student: Student, inpaint, interpolate, **options):
    """A function of `steps` that draws pictures; the files are read and checked now."""
    from flowmap.student import edit as pictures

    channels = pictures.picture_shape(student)[0]
    if inpaint is not None:
        picture, mask = pictures.read_picture(inpaint[0], channels, "--inpaint"), pictures.read_mask(inpaint[1])
        return partial(pictures.inpaint, student, picture, mask, **options)
    first, second = (pictures.read_picture(path, channels, "--interpolate") for path in interpolate)
    return partial(pictures.interpolate, student, first, second, **options)


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
    solver: str | None = None,
    inpaint: tuple[str | Path, str | Path] | None = None,
    interpolate: tuple[str | Path, str | Path] | None = None,
    compile: bool = False,
    reward: Tilted | Reward | None = None,
) -> list[Path]:
    """Write out/steps-K.png (a grid) and out/steps-K/NNNNN.png for every K; returns the paths of the grids.

    Points are written as out/steps-K.csv, sentences as out/steps-K.txt, one a line. refine, solver, compile, reward: as
    in Student.sample. inpaint: the files of a picture and a mask; interpolate: those of two pictures (edit.py). Samples
    are drawn as they are measured: in the precision of the student's training and, where evaluation.batch_size is
    below 256, in batches of that size.
    """
    student = student if isinstance(student, Student) else load_student(student)
    trained = recipe_of(student)
    for k in steps:
        if k < 1:
            raise ValueError(f"steps: {k} must be 1 or more")
    if inpaint is None and interpolate is None:
        options = dict(cond=cond, guidance=guidance, gamma=gamma, refine=refine, progress=progress)
        options |= dict(compile=compile, reward=reward)
        size = BATCH if trained is None else min(BATCH, trained.evaluation.batch_size)
        draw = partial(student.sample, num, **options, seed=seed, solver=solver, batch_size=size)
    else:
        if num < 1:
            raise ValueError(f"num: {num} must be 1 or more")
        given = cond or compile or any(one is not None for one in (guidance, gamma, refine, reward))
        if given or None not in (inpaint, interpolate):
            what = "exclude one another, and conditions, guidance, gamma, a reward, a refiner and --compile"
            raise ValueError(f"--inpaint, --interpolate: {what}")
        draw = _edited(student, inpaint, interpolate, num=num, solver=solver, seed=seed)
    drawn = in_precision(draw, "32" if trained is None else trained.trainer.precision, student.device)
    return [_write(Path(out), k, drawn(steps=k)) for k in steps]


def recipe_of(student: Student) -> Recipe | None:
    """The recipe in the student's folder; None if there is none that this version can read."""
    path = None if student.folder is None else student.folder / "recipe.yaml"
    if path is None or not path.is_file():
        return None
    try:
        return read_resolved(path)
    except ValueError:
        return None


def _write(out: Path, steps: int, samples: Tensor | list[str]) -> Path:
    """Write the samples of one number of steps; returns the path of the grid, or of the sentences."""
    if not isinstance(samples, Tensor):
        path = out / f"steps-{steps}.txt"
        write_text(path, "\n".join(" ".join(text.splitlines()) for text in samples) + "\n")
        return path
    samples, grid = samples.float(), out / f"steps-{steps}.png"
    save_picture(grid, stack([to_grid(samples)], [steps_label("student", steps)]))
    if samples.ndim == 4:
        for i, one in enumerate(samples):
            save_picture(out / f"steps-{steps}" / f"{i:05d}.png", to_picture(one))
    else:
        rows = (",".join(f"{value:.6g}" for value in row) for row in samples.flatten(1).tolist())
        write_text(out / f"steps-{steps}.csv", "\n".join(rows) + "\n")
    return grid


def edit_file(
    student: Student, file: Path, out: Path, steps: Sequence[int], cond: dict, reverse: bool = False
) -> list[Path]:
    """Write out/steps-K.txt: the sentences of a file, one a line, carried to the student's target style.

    reverse: carry them back from it. Line i of the result belongs to line i of the file; an empty line stays empty, and
    a warning counts them.
    """
    if not file.is_file():
        raise ValueError(f"--texts: {file}: there is no such file")
    if min(steps) < 1:
        raise ValueError(f"--steps: {min(steps)} must be 1 or more")
    lines = [one_line(line) for line in lines_of(file)]
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"--texts: {file}: has no sentence")
    if len(texts) < len(lines):
        warnings.warn(f"--texts: {len(lines) - len(texts)} of {len(lines)} lines are empty, and stay so", stacklevel=2)
    paths = [out / f"steps-{k}.txt" for k in steps]
    for k, path in zip(steps, paths, strict=True):
        edited = iter(edit(student, texts, k, cond, reverse, prefix="--"))
        write_text(path, "\n".join(" ".join(next(edited).splitlines()) if line else "" for line in lines) + "\n")
    return paths


def attribute_of(word: str) -> tuple[str, str | int]:
    """name=value of the command line as a condition; whole numbers are numbers."""
    name, sign, value = word.partition("=")
    if not sign:
        raise ValueError(f"--attribute: {word!r} is not of the form name=value")
    return name, int(value) if value.lstrip("-").isdigit() else value
