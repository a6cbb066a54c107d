"""The figures of a student and its teacher: every metric at each number of steps, and the real-vs-real baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowmap.base.files import write_json
from flowmap.base.images import steps_name
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.teacher import BuiltTeacher, build_teacher
from flowmap.build.text import flow_alone
from flowmap.data import Dataset, Pairs
from flowmap.evaluation.known_rows import read_known, stamps, to_teacher
from flowmap.evaluation.rows import Rows
from flowmap.metrics import Spec, check_metrics
from flowmap.plan.plan import resolve
from flowmap.plan.references import located
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.student.tuned import Tuned, tuned_json

ONLY_TRAINING = (
    "nothing is held out (data.held_out): distances are to the training samples alone, under keys that end in _train"
)


def evaluate(
    student: str | Path | Student,
    steps: Sequence[int] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    progress: LogFunction | None = None,
    teacher: bool = True,
    anew: bool = False,
) -> dict[str, Any]:
    """The contents of metrics.json for a saved student, with its own recipe's data, teacher and metrics.

    steps: default the recipe's. metrics: only those kinds. The teacher's rows are left out without `teacher`, or if its
    weights are not on this machine. They and the floor are copied from the run's metrics.json if nothing that they
    depend on has changed, unless `anew` is given.
    """
    student = student if isinstance(student, Student) else load_student(student)
    if student.folder is None or not (student.folder / "recipe.yaml").is_file():
        raise ValueError("student: evaluate needs the recipe.yaml in the folder of the weights")
    run = flow_alone(resolve(read_resolved(student.folder / "recipe.yaml")), student.folder)
    recipe = run.recipe
    chosen = _chosen(recipe, metrics)
    for k in steps or ():
        if k < 1:
            raise ValueError(f"steps: {k} must be 1 or more")
    data, built = build_data(run), None
    try:
        built = build_teacher(run, data) if teacher else None
        built = built and built.to(student.device)
    except RecipeError as error:
        if progress is not None:
            progress(f"no teacher's row: {error}")
    known = {} if anew else read_known(student.folder)
    measured = measure(
        recipe, student, built, data, steps=steps, metrics=chosen, guidance=guidance, progress=progress, known=known
    )
    if out is not None:
        write_json(Path(out), measured)
    return measured


def measure(
    recipe: Recipe,
    student: Student,
    teacher: BuiltTeacher | None,
    data: Dataset,
    *,
    steps: Sequence[int] | None = None,
    metrics: Sequence[Spec] | None = None,
    guidance: float | None = None,
    progress: LogFunction | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of metrics.json. Every row starts from the same noise and classes.

    All processes call it and each draws its share. known: the contents of an earlier metrics.json, from which the
    teacher's rows and the floor are taken where their stamps are the same.
    """
    started, log = time.perf_counter(), progress or (lambda message: None)
    specs, known, chosen = recipe.metrics if metrics is None else metrics, known or {}, steps or recipe.sampler.steps
    check_metrics(specs, data, conditional=recipe.data.conditional, paired=isinstance(recipe.coupling, Pairs))
    rows = Rows(recipe, student, teacher, data, located(recipe, specs), guidance, progress)
    stamp = stamps(recipe, student, teacher, data, specs, rows.starts.first)
    same = {key for key in stamp if known.get("stamp", {}).get(key) == stamp[key]}
    nfe: dict[str, Any] = {"student": {str(k): recipe.sampler.calls(k) for k in chosen}}
    of_student, seconds = _student_rows(rows, chosen, student.config.tuned_at, known if "student" in same else {})
    result: dict[str, Any] = {"student": of_student, "stamp": stamp, **student.quantized_json()}
    if used := [one for one in student.config.tuned if one.steps in chosen]:
        result["tuned"] = tuned_json(
            tuple(one if guidance is None else replace(one, guidance=guidance) for one in used)
        )
    if teacher is not None:
        of_teacher = _known_teacher(known, log) if "teacher" in same else _teacher_rows(recipe, teacher, rows)
        result, seconds["teacher"] = result | of_teacher[0], of_teacher[1]
        nfe["teacher"] = result["teacher"]["nfe"]
    result["floor"] = _floor(data, rows, known["floor"] if "floor" in same else None, log)
    if rows.decode_seconds > 0:
        seconds["decode"] = rows.decode_seconds
    seconds["evaluate"] = time.perf_counter() - started
    result |= {"seconds": {key: round(value, 4) for key, value in seconds.items()}, "nfe": nfe}
    if data.note is not None:
        log(f"note: {data.note}")
        result["data"] = data.note
    sentences = data.sentence_counts()
    return result if sentences is None else result | {"sentences": sentences}


def _student_rows(
    rows: Rows, steps: Sequence[int], tuned: Callable[[int], Tuned | None], known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """("student" of metrics.json, the seconds of drawing each row).

    tuned: the settings of a number of steps. known: an earlier metrics.json, from which the distances to the teacher
    are taken.
    """
    found, seconds = {}, {}
    for k in steps:
        mine = rows.tuned(tuned(k))
        mine.starts.begin(f"student {steps_name(k)}")
        found[str(k)], seconds[f"student_{k}"] = mine.student(k, to_teacher(known, k))
    return found, seconds


def _known_teacher(known: Mapping[str, Any], log: LogFunction) -> tuple[dict[str, Any], float]:
    """The same as `_teacher_rows`, from an earlier metrics.json."""
    log("teacher: as in metrics.json, from which nothing has changed")
    return {key: known[key] for key in ("teacher", "teacher_few") if key in known}, known["seconds"]["teacher"]


def _teacher_rows(recipe: Recipe, teacher: BuiltTeacher, rows: Rows) -> tuple[dict[str, Any], float]:
    """("teacher" and "teacher_few" of metrics.json, the seconds of drawing the first)."""
    n, few = recipe.evaluation.teacher_steps, recipe.evaluation.teacher_extra_steps
    rows.starts.begin(f"teacher {steps_name(n)}")
    row, seconds = rows.teacher(n)
    found: dict[str, Any] = {"teacher": {"nfe": teacher.calls(n), "steps": n, **row}}
    if few:
        rows.starts.begin("teacher at few steps")
        found["teacher_few"] = {str(k): rows.teacher(k)[0] for k in few}
    return found, seconds


def _floor(data: Dataset, rows: Rows, known: Mapping[str, float] | None, log: LogFunction) -> Mapping[str, float]:
    """The distances of real samples to real samples: the known ones, or measured now."""
    if not data.num_held_out:
        log(ONLY_TRAINING)
    if known is not None:
        return known
    log("evaluating: real against real")
    return rows.baseline(data)


def _chosen(recipe: Recipe, kinds: Sequence[str] | None) -> list[Spec]:
    from flowmap.base.schema import OWN_KINDS, kind_of, suggest
    from flowmap.recipe.kinds import TABLES, Metric

    if kinds is None:
        return list(recipe.metrics)
    for kind in kinds:
        if kind not in TABLES[Metric]:
            close = suggest(kind, TABLES[Metric])
            allowed = ", ".join(TABLES[Metric])
            raise ValueError(f"metrics: {kind!r} is not one of {allowed}{close or OWN_KINDS}")
    chosen: list[Spec] = []
    for kind in kinds:
        chosen += [spec for spec in recipe.metrics if kind_of(spec, TABLES) == kind] or [TABLES[Metric][kind]()]
    return chosen
