"""Samples of a student at several numbers of steps, and of its teacher, all from the same noise and conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.images import steps_label
from flowmap.base.precision import in_precision, wait_for
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher, build_teacher, guided_by
from flowmap.build.text import flow_alone
from flowmap.evaluation.samples import BATCH, recipe_of
from flowmap.flow.prior import conditioning_rows
from flowmap.flow.types import Cond
from flowmap.plan.named_networks import missing_weights
from flowmap.plan.plan import ResolvedRun, resolve
from flowmap.recipe.recipe import Recipe
from flowmap.recipe.settings import ClassifierFree
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.teachers.network import NetworkTeacher

TEACHER_STEPS = 64  # of a teacher whose recipe is not known


@dataclass(frozen=True)
class Column:
    """Samples (pictures (N, C, H, W) in [-1, 1], points or sentences), the seconds of drawing and decoding them, and
    the network calls for each of them.
    """

    label: str
    samples: Tensor | list[str]
    seconds: float
    calls: int


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher on the student's device, its number of steps, and a remark for its label."""

    built: BuiltTeacher
    steps: int
    remark: str = ""

    @property
    def label(self) -> str:
        return steps_label("teacher", self.steps) + self.remark


class NoTeacher(ValueError):
    """The student's recipe has no teacher, or its weights are not on this machine."""


def load_teacher(student: Student, folder: str | Path | None = None, *, steps: int | None = None) -> LoadedTeacher:
    """The teacher of the student's recipe with its guidance or, if `folder` is given, the network in that folder.

    folder: a student's or run's folder, or a hub id; of the recipe's guidance, only classifier-free guidance is
    applied to it. steps: default evaluation.teacher_steps of the recipe. Raises NoTeacher, of one line, if the recipe
    has none or the weights are not on this machine, and ValueError for a user's mistake.
    """
    recipe = recipe_of(student)
    steps = _steps(recipe, steps)
    if folder is not None:
        built, remark = _from_folder(student, recipe, folder)
    else:
        built, remark = _from_recipe(student, recipe), ""
    if student.config.text is not None:
        built.with_null_conditions(student.text([""]))
    return LoadedTeacher(built.to(student.device), steps, remark)


def teacher_or_none(
    student: Student, steps: int | None, log: LogFunction, what: str = "column"
) -> LoadedTeacher | None:
    """The teacher of the student's recipe, or None and a line that says why its `what` is left out (NoTeacher)."""
    try:
        return load_teacher(student, steps=steps)
    except NoTeacher as error:
        log(f"no teacher's {what}: {error}")
        return None


def teacher_without_weights(student: Student, steps: int | None = None) -> tuple[LoadedTeacher, list[str]]:
    """The teacher of the student's recipe, of which only label and calls are known, and lines on what is missing.

    No network of it is loaded. Raises NoTeacher if the recipe has none.
    """
    recipe = recipe_of(student)
    steps, run = _steps(recipe, steps), _run(student, recipe)
    if (slot := run.recipe.teacher) is None:
        raise NoTeacher(f"student: its recipe {run.recipe.name} has no teacher")
    cards = (card for card in run.cards if card.kind not in ("recipe", "exact"))
    missing = [line for card in cards if (line := missing_weights(card))]
    for needed in run.teachers:
        try:
            run.finished(needed, "teacher.recipe")
        except RecipeError as error:
            missing.append(str(error))
    none: Any = None  # the velocities, which are not asked
    return LoadedTeacher(BuiltTeacher(guided_by(slot.guidance, none, none), None), steps), missing


def _steps(recipe: Recipe | None, steps: int | None) -> int:
    default = TEACHER_STEPS if recipe is None else recipe.evaluation.teacher_steps
    if (steps := default if steps is None else steps) < 1:
        raise ValueError(f"--teacher-steps: {steps} must be 1 or more")
    return steps


def _run(student: Student, recipe: Recipe | None) -> ResolvedRun:
    if recipe is None or student.folder is None:
        raise NoTeacher("student: its folder has no recipe.yaml of this version, which names the teacher")
    return flow_alone(resolve(recipe), student.folder)


def _from_recipe(student: Student, recipe: Recipe | None) -> BuiltTeacher:
    run = _run(student, recipe)
    try:
        built = build_teacher(run)
    except RecipeError as error:
        raise NoTeacher(str(error)) from error
    if built is None:
        raise NoTeacher(f"student: its recipe {run.recipe.name} has no teacher")
    return built


def _from_folder(student: Student, recipe: Recipe | None, folder: str | Path) -> tuple[BuiltTeacher, str]:
    network = load_student(folder)
    if tuple(network.config.shape) != tuple(student.config.shape):
        theirs, mine = tuple(network.config.shape), tuple(student.config.shape)
        raise ValueError(f"--teacher: {folder} has samples of shape {theirs}, the student of {mine}")
    guidance = recipe.teacher.guidance if recipe is not None and recipe.teacher is not None else None
    applied = guidance if isinstance(guidance, ClassifierFree) else None
    velocity = NetworkTeacher(network.flow_map)
    built = BuiltTeacher(guided_by(applied, velocity, velocity), network, (network.flow_map,))
    return built, "" if guidance is applied else ", without guidance"


@torch.no_grad()
def columns(
    student: Student,
    teacher: LoadedTeacher | None,
    *,
    num: int,
    steps: Sequence[int] = (1, 2, 4),
    cond: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> list[Column]:
    """The student's samples at each number of steps, then the teacher's. Sample i of all columns has the same noise.

    The arguments are those of Student.sample, whose errors are raised for what is wrong. Where `guidance` is None each
    column has the student's scale for its number of steps, and the teacher the student's default.
    """
    recipe = recipe_of(student)
    size = BATCH if recipe is None else min(BATCH, recipe.evaluation.batch_size)
    timed = partial(_timed, student.device, "32" if recipe is None else recipe.trainer.precision)
    draw = partial(student.sample, num, cond=cond, guidance=guidance, seed=seed, batch_size=size)
    found = []
    for k in steps:
        samples, seconds = timed(partial(draw, steps=k))
        found.append(Column(steps_label("student", k), samples, seconds, student.config.sampler_at(k).calls(k)))
    if teacher is not None:
        samples, seconds = timed(lambda: solved(student, teacher, num, cond, guidance, seed, batch_size=size))
        found.append(Column(teacher.label, samples, seconds, teacher.built.calls(teacher.steps)))
    return found


def solved(
    student: Student,
    teacher: LoadedTeacher,
    num: int,
    cond: Mapping[str, Any] | None,
    guidance: float | None,
    seed: int,
    batch_size: int = BATCH,
) -> Tensor | list[str]:
    """The teacher's samples from the noise and the conditions of student.sample(num, ...), decoded as the student's."""
    return solved_from(student, teacher, *starts_of(student, num, cond, guidance, seed), batch_size=batch_size)


def solved_from(
    student: Student, teacher: LoadedTeacher, x1: Tensor, rows: Cond, *, batch_size: int
) -> Tensor | list[str]:
    """The teacher's samples from the start points x1 (N, *shape) and their conditions, decoded as the student's."""
    parts = [slice(i, i + batch_size) for i in range(0, len(x1), batch_size)]
    own = lambda part: {key: value[part] for key, value in rows.items()}
    x0 = torch.cat([teacher.built.solve(x1[part], own(part), teacher.steps) for part in parts])
    return student.pictures(x0) if student.config.text_autoencoder is None else student.sentences(x0)


def starts_of(
    student: Student, num: int, cond: Mapping[str, Any] | None, guidance: float | None, seed: int
) -> tuple[Tensor, Cond]:
    """The start points (N, *shape) and the conditions of student.sample(num, ...), on the student's device."""
    rows = student.conditions(num, cond, guidance)
    start = student.start(num, torch.Generator().manual_seed(seed), rows.pop("z", None))
    return start.x1.to(student.device), {**rows, **conditioning_rows(start, slice(None), student.device)}


def _timed(device: torch.device, precision: str, draw: Callable[[], Any]) -> tuple[Tensor | list[str], float]:
    """The samples and the seconds of drawing them, in that precision."""
    started = time.perf_counter()
    samples = in_precision(draw, precision, device)()
    wait_for(device)
    return samples, time.perf_counter() - started
