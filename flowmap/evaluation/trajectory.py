"""The way from noise to data as pictures: along the teacher's path, and by the student's jumps, from the same noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from flowmap.base.images import stack, steps_label, to_grid
from flowmap.base.precision import in_precision
from flowmap.evaluation.columns import LoadedTeacher, starts_of
from flowmap.evaluation.samples import recipe_of
from flowmap.flow.solver import euler_step, integrate, uniform_times
from flowmap.flow.types import Cond
from flowmap.samplers import Deterministic, Solve
from flowmap.samplers.grids import FewStep
from flowmap.student.student import Student

FRAMES = 8  # of the teacher's path in a picture; its steps are a multiple of it
POINTS = 2048  # samples of points, whose density is drawn
SECONDS, REST = 0.25, 1.5  # of a frame, and of the last one


@dataclass(frozen=True)
class Way:
    """States at falling times, from noise at the first to data at the last, each as one picture."""

    label: str
    times: tuple[float, ...]
    pictures: tuple[Image.Image, ...]

    def at(self, time: float) -> Image.Image:
        """The last state that is reached by that time."""
        reached = [picture for t, picture in zip(self.times, self.pictures, strict=True) if t >= time - 1e-6]
        return reached[-1] if reached else self.pictures[0]


@torch.no_grad()
def ways(
    student: Student, teacher: LoadedTeacher | None, *, num: int = 4, steps: Sequence[int] = (4, 2, 1), seed: int = 0
) -> list[Way]:
    """The teacher's path, then the student's jumps at each number of steps. Conditions are the student's defaults.

    Raises ValueError for a student of sentences, of prompts, or of a sampler that adds noise between its jumps.
    """
    config = student.config
    if config.text_autoencoder is not None or config.text is not None or config.edits:
        raise ValueError("trajectory: is drawn of students of pictures or points that need no prompt")
    for k in steps:
        if not isinstance(config.sampler_at(k), (Deterministic, Solve)):
            kind = type(config.sampler_at(k)).__name__
            raise ValueError(f"trajectory: the sampler {kind} does not only move along a path")
    x1, rows = starts_of(student, POINTS if len(config.shape) == 1 else num, None, None, seed)
    recipe = recipe_of(student)
    draw = partial(in_precision, precision="32" if recipe is None else recipe.trainer.precision, device=student.device)
    found = [] if teacher is None else [draw(_along_teacher)(student, teacher, x1, rows)]
    return found + [draw(_by_jumps)(student, x1, rows, k) for k in steps]


def _along_teacher(student: Student, teacher: LoadedTeacher, x1: Tensor, rows: Cond) -> Way:
    per_frame = max(1, round(teacher.steps / FRAMES))
    times = uniform_times(per_frame * FRAMES)
    velocity = partial(teacher.built.guided.velocity, cond=rows)
    states = integrate(velocity, x1, times, step=euler_step, keep=True).trajectory
    assert states is not None
    label = steps_label("teacher", per_frame * FRAMES) + teacher.remark
    return Way(label, times[::per_frame], tuple(_picture(student, one) for one in states[::per_frame]))


def _by_jumps(student: Student, x1: Tensor, rows: Cond, steps: int) -> Way:
    sampler = student.config.sampler_at(steps)
    assert isinstance(sampler, FewStep)
    times = sampler.times(steps)
    states = [sampler.start(x1)]
    for t, s in zip(times, times[1:], strict=False):
        states.append(sampler.step(student.flow_map, states[-1], t, s, rows))
    return Way(steps_label("student", steps), times, tuple(_picture(student, one) for one in states))


def _picture(student: Student, x: Tensor) -> Image.Image:
    return to_grid(student.pictures(x).float(), columns=2, least=32).convert("RGB")


def sheet(found: Sequence[Way], frames: int = FRAMES) -> Image.Image:
    """A row for each way, with the states that are reached by frames + 1 even times, noise on the left.

    A cell is empty where nothing has moved since the cell before.
    """
    times = uniform_times(frames)
    rows = []
    for way in found:
        cells = [way.at(time) for time in times]
        width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
        row = Image.new("RGB", (len(cells) * (width + 6), height), (255,) * 3)
        for i, cell in enumerate(cells):
            if i == 0 or cell is not cells[i - 1]:
                row.paste(cell, (i * (width + 6), 0))
        rows.append(row)
    return stack(rows, [way.label for way in found])


def animation(found: Sequence[Way], frames: int = FRAMES) -> bytes:
    """A GIF of the ways below one another, as the time falls from 1 to 0, which starts again at the end."""
    pictures = [stack([way.at(time) for way in found], [way.label for way in found]) for time in uniform_times(frames)]
    file = io.BytesIO()
    durations = [*[round(1000 * SECONDS)] * (len(pictures) - 1), round(1000 * REST)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return file.getvalue()
