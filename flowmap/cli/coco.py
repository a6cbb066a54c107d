"""`flowmap evaluate --protocol coco30k`: text to image by the papers' protocol on COCO-2014 (evaluation/coco.py)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmap.cli.arguments import check_figures, given_student
from flowmap.cli.terminal import log

if TYPE_CHECKING:
    from flowmap.evaluation.coco import Coco
    from flowmap.evaluation.columns import LoadedTeacher
    from flowmap.metrics.statistics import Statistics
    from flowmap.student.student import Student

ONLY = "coco images weights clip teacher_steps dry_run seed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the protocol of text to image")
    what = "30,000 captions of COCO-2014, FID at 256 pixels and CLIP score; needs --coco and --out"
    group.add_argument("--protocol", choices=["coco30k"], help=what)
    group.add_argument("--coco", metavar="DIR", help="the folder with val2014/ and captions_val2014.json")
    group.add_argument("--images", type=int, metavar="N", help="captions (default: 30,000)")
    group.add_argument("--weights", metavar="FILE", help="of Inception (default: as for the metric)")
    group.add_argument("--clip", metavar="DIR|HUB-ID|none", help="model of the CLIP score (default: ViT-L/14)")
    group.add_argument("--teacher-steps", type=int, metavar="N", help="of the teacher's row (default: the recipe's)")
    group.add_argument("--seed", type=int, help="of the noise (default: that of evaluation)")
    what = "print the network calls, GPU-hours and what is missing; draw nothing"
    group.add_argument("--dry-run", action="store_true", default=None, help=what)


def refuse(a: argparse.Namespace) -> None:
    """Raise ValueError for an option of the protocol without --protocol."""
    if (given := next((name for name in ONLY.split() if getattr(a, name) is not None), None)) is not None:
        raise ValueError(f"--{given.replace('_', '-')}: goes with --protocol")


def run(a: argparse.Namespace) -> int:
    from flowmap.evaluation.columns import teacher_or_none
    from flowmap.student.folder import load_student

    student = load_student(a.student, base=a.base) if a.dry_run else given_student(a)
    coco = _asked(a, student)
    steps, missing = a.steps or list(student.config.sampler.steps), coco.lacking()
    if a.dry_run:
        return _dry_run(a, coco, student, steps, missing)
    if missing:
        raise ValueError(missing[0])
    _check_files(Path(a.out), coco)
    teacher = teacher_or_none(student, a.teacher_steps, log, "row") if a.teacher else None
    print(_measure(a, coco, student, steps, teacher), end="")
    return 0


def _dry_run(a: argparse.Namespace, coco: Coco, student: Student, steps: list[int], missing: list[str]) -> int:
    """Print the plan and what is missing, the teacher among it; returns the exit status."""
    from flowmap.evaluation.columns import NoTeacher, teacher_without_weights

    teacher = None
    try:
        if a.teacher:
            teacher, lines = teacher_without_weights(student, a.teacher_steps)
            missing = [*missing, *lines]
    except NoTeacher as error:
        log(f"no teacher's row: {error}")
    print("\n".join([*_plan(coco, student, steps, teacher), *(f"missing on this machine: {one}" for one in missing)]))
    return 3 if missing else 0


def _measure(
    a: argparse.Namespace, coco: Coco, student: Student, steps: list[int], teacher: LoadedTeacher | None
) -> str:
    """Measure the rows and write the figures; returns the page of them."""
    from flowmap.base.files import write_json, write_text
    from flowmap.evaluation.coco import beside, figures_page
    from flowmap.evaluation.coco_rows import CocoRows

    out = Path(a.out)
    captions = beside(out, "captions.txt")
    coco.write_captions(captions)
    log(f"captions: {captions}")
    rows = CocoRows(student, coco, _reference(coco, student), out, a.guidance, _seed(a, student), log)
    measured = rows.measure(steps, teacher)
    write_json(out, measured)
    page = figures_page(measured, [name for name in (coco.key, coco.clip_key) if name is not None])
    write_text(beside(out, "figures.md"), page)
    rows.forget()
    return page


def _asked(a: argparse.Namespace, student: Student) -> Coco:
    from flowmap.evaluation.coco import Coco

    if a.metrics or a.anew:
        raise ValueError("--metrics, --anew: do not go with --protocol, which has metrics of its own")
    if a.coco is None or (a.out is None and not a.dry_run):
        raise ValueError("--protocol: wants --coco DIR, and --out FILE.json")
    if student.config.text is None:
        raise ValueError("--protocol: this student is not conditioned on text")
    if any(k < 1 for k in a.steps or ()):
        raise ValueError(f"--steps: {min(a.steps)} must be 1 or more")
    if a.teacher_steps is not None and a.teacher_steps < 1:
        raise ValueError(f"--teacher-steps: {a.teacher_steps} must be 1 or more")
    coco = Coco(Path(a.coco), weights=a.weights)
    if a.images is not None and a.images < 2:
        raise ValueError(f"--images: {a.images} must be 2 or more")
    coco = coco if a.images is None else replace(coco, images=a.images)
    return coco if a.clip is None else replace(coco, clip=None if a.clip == "none" else a.clip)


def _check_files(out: Path, coco: Coco) -> None:
    """Raise ValueError if one of the files to write cannot be written, or is there and is no earlier result of this.

    Captions that are the same are an earlier result too: of a measurement that was interrupted.
    """
    from flowmap.base.files import check_writable
    from flowmap.evaluation.coco import beside

    check_writable(out.parent, "--out")
    check_figures(out, protocol=True)
    captions, page = beside(out, "captions.txt"), beside(out, "figures.md")
    again = out.is_file()
    for path, same in ((captions, lambda: again or coco.wrote(captions)), (page, lambda: again)):
        if path.exists() and not (path.is_file() and same()):
            raise ValueError(f"--out: {path} is there, and {out} is no earlier result; choose another file")


def _seed(a: argparse.Namespace, student: Student) -> int:
    from flowmap.evaluation.samples import recipe_of

    recipe = recipe_of(student)
    return a.seed if a.seed is not None else 0 if recipe is None else recipe.evaluation.seed


def _reference(coco: Coco, student: Student) -> Statistics:
    """The statistics of the real pictures, made once and kept with those of other recipes."""
    from flowmap.plan.references import ReferenceStatistics
    from flowmap.prepare.reference import make_reference

    stage = ReferenceStatistics(_recipe(coco, student), coco.features, coco.weights)
    found = make_reference(stage, device=student.device, log=log)
    assert found is not None, "one process makes all parts"
    return found


def _recipe(coco: Coco, student: Student) -> Any:
    """The student's recipe with the real pictures as those of its data."""
    from flowmap.data import Encoded
    from flowmap.evaluation.samples import recipe_of

    recipe = recipe_of(student)
    if recipe is None or not isinstance(recipe.data, Encoded):
        raise ValueError(
            "--protocol: the student's folder has no recipe of pictures with captions (data.kind: encoded)"
        )
    images: Any = coco.reference
    return recipe.changed(data=replace(recipe.data, images=images))


def _plan(coco: Coco, student: Student, steps: list[int], teacher: LoadedTeacher | None) -> Iterator[str]:
    """The network calls of each row, and the GPU-hours by the costs of the dry run."""
    from flowmap.base.images import steps_label
    from flowmap.evaluation.coco import calls_of

    rows = {steps_label("student", k): student.config.sampler_at(k).calls(k) for k in steps}
    if teacher is not None:
        rows[teacher.label] = teacher.built.calls(teacher.steps)
    yield f"{coco.images:,} captions, pictures at {coco.size} pixels, {coco.key}, {coco.clip_key or 'no CLIP score'}"
    yield from calls_of(coco, rows)
    yield from _hours(coco, student, steps, teacher)


def _hours(coco: Coco, student: Student, steps: list[int], teacher: LoadedTeacher | None) -> Iterator[str]:
    from flowmap.estimate.networks import teacher_configs
    from flowmap.estimate.price import Prices, Traffic, evaluation_parts, hours
    from flowmap.metrics import CLIPScore, Frechet
    from flowmap.plan.plan import resolve

    recipe = _recipe(coco, student)
    metrics: list[Any] = [Frechet(features=coco.features, images=coco.images, weights=coco.weights)]
    metrics += [] if coco.clip is None else [CLIPScore(model=coco.clip, images=coco.images)]
    evaluation = replace(recipe.evaluation, captions="captions", teacher_extra_steps=())
    if teacher is not None:
        evaluation = replace(evaluation, teacher_steps=teacher.steps)
    sampler = replace(recipe.sampler, steps=tuple(steps))
    run = resolve(recipe.changed(metrics=tuple(metrics), evaluation=evaluation, sampler=sampler))
    teachers = [] if teacher is None else [one for _, one in teacher_configs(run, student.config)]
    parts = evaluation_parts(Prices(), run, student.config, teachers)
    yield f"in all {hours(sum((part for _, part in parts), Traffic()))}"
    yield from (f"  {name}: {hours(part)}" for name, part in parts if part.slow_seconds)
