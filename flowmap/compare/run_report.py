"""`flowmap report`: one HTML file about runs, with samples, trajectories, curves, figures, costs and recipes.

Everything is in the file: pictures are data URIs, nothing is loaded from elsewhere, and there is no script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowmap.base.files import check_writable, write_text
from flowmap.base.images import stack, steps_label, to_grid
from flowmap.base.progress import LogFunction
from flowmap.base.schema import kind_of, to_plain
from flowmap.compare import html
from flowmap.compare.curves import curves_png
from flowmap.compare.finished import Finished, check_alike, differences, read_runs, tabulated
from flowmap.compare.report import note, table
from flowmap.evaluation import tables
from flowmap.evaluation.columns import LoadedTeacher, columns, load_teacher
from flowmap.evaluation.trajectory import animation, sheet, ways
from flowmap.metrics import TRAIN
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.train.csv_log import read_log

MADE_BY = '<meta name="generator" content="flowmap report">'  # by which a report of flowmap's is recognised
LABELS = {
    "student": "student, {steps} step{s}",
    "teacher_few": "teacher, {steps} step{s}",
    "teacher": "teacher, {steps} step{s}",
    "floor": "real against real",
    "spread": "its standard deviation",
}
DRAWN = 16  # samples of a run that has drawn none


def write_run_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    draw: bool = True,
    device: torch.device | str = "cpu",
    log: LogFunction = lambda message: None,
) -> Path:
    """Write the report of these runs, finished or not, and return its path.

    draw: load students and teachers to draw trajectories, and samples of a run that has drawn none; what is missing is
    said in the report. Raises ValueError for a user's mistake.
    """
    path = Path(out)
    _check_file(path)
    runs = read_runs(folders, unfinished=True)
    recipes = [read_resolved(run.folder / "recipe.yaml") for run in runs]
    title = ", ".join(run.name for run in runs)
    parts = [html.heading(1, title), _overview(runs, recipes)]
    if len(runs) > 1:
        parts += [*_league(runs), *_recipe_differences(runs, recipes)]
    parts += _curves(runs)
    for run, recipe in zip(runs, recipes, strict=True):
        log(f"report: {run.name}")
        parts += [html.heading(2, run.name, run.name), *_of_run(run, recipe, torch.device(device) if draw else None)]
    write_text(path, html.document(f"flowmap: {title}", parts, made_by=MADE_BY))
    return path


def _check_file(path: Path) -> None:
    check_writable(path.parent, "--out")
    if path.suffix.lower() != ".html":
        raise ValueError(f"--out: {path}: must end in .html")
    if path.exists() and not (path.is_file() and MADE_BY.encode() in path.read_bytes()):
        raise ValueError(f"--out: {path} is there and is no report of flowmap's; choose another file")


def _overview(runs: Sequence[Finished], recipes: Sequence[Recipe]) -> str:
    rows = [
        [run.name, recipe.name, kind_of(recipe.objective, TABLES) or "?", _state(run, recipe), _seconds(run)]
        for run, recipe in zip(runs, recipes, strict=True)
    ]
    return html.table(["run", "recipe", "objective", "state", "training seconds"], rows, text=True)


def _state(run: Finished, recipe: Recipe) -> str:
    steps = recipe.trainer.steps
    if run.metrics:
        done = run.metrics.get("training", {}).get("steps", steps)
        return f"finished, {done} of {steps} steps" if done != steps else f"finished, {steps} steps"
    logged = _log(run)
    return f"not finished: {int(logged[-1]['step']) + 1 if logged else 0} of {steps} steps are logged"


def _league(runs: Sequence[Finished]) -> Iterator[str]:
    """The tables of `compare --runs` for the finished ones, or why there are none."""
    yield html.heading(2, "Side by side")
    finished = [run for run in runs if run.metrics]
    try:
        if len(finished) < 2:
            raise ValueError("fewer than two of the runs are finished")
        check_alike(finished)
        found = tabulated(finished)
    except ValueError as error:
        yield html.paragraph(f"No table: {str(error).removeprefix('--runs: ')}", note=True)
        return
    for metric in [name for name in found["metrics"] if not name.endswith(TRAIN)] or found["metrics"]:
        yield html.heading(3, metric)
        yield html.from_markdown(table(found, metric, costs=False).splitlines())
    yield from (html.paragraph(line, note=True) for line in note(found))


def _recipe_differences(runs: Sequence[Finished], recipes: Sequence[Recipe]) -> Iterator[str]:
    """The settings in which a recipe differs from the first one."""
    yield html.heading(2, "Settings that differ")
    plain = [to_plain(recipe, TABLES) for recipe in recipes]
    found = [{key: (mine, theirs) for key, mine, theirs in differences(plain[0], other)} for other in plain[1:]]
    rows = []
    for key in dict.fromkeys(key for one in found for key in one):
        first = next(one[key][0] for one in found if key in one)
        rows.append([key, *(_setting(value) for value in [first, *(one.get(key, (first,) * 2)[1] for one in found)])])
    if rows:
        yield html.table(["setting", *(run.name for run in runs)], rows, text=True)
    else:
        yield html.paragraph("None: the recipes are the same.")


def _setting(value: Any) -> str:
    return "" if value is None else str(value)


def _curves(runs: Sequence[Finished]) -> Iterator[str]:
    yield html.heading(2, "Curves")
    data = curves_png(runs)
    if data is None:
        yield html.paragraph("These runs have logged no step yet.", note=True)
    else:
        yield html.image_of(data, "image/png", "loss, norms and metrics", smooth=True)


def _of_run(run: Finished, recipe: Recipe, device: torch.device | None) -> Iterator[str]:
    """The section of a run; nothing is drawn without a device."""
    yield html.paragraph(f"{_state(run, recipe)}; {run.folder}", note=True)
    student, teacher, why = _loaded(run, device)
    yield html.heading(3, "Samples")
    yield from _samples(run, student, teacher, why)
    if run.metrics:
        yield html.heading(3, "Figures")
        yield from _figures(run.metrics)
    yield html.heading(3, "Cost")
    yield html.table(["training", ""], [[key, f"{value:.4g}"] for key, value in _training(run).items()])
    yield from _costs(run.metrics) if run.metrics else ()
    yield html.heading(3, "From noise to data")
    yield from _trajectory(student, teacher, why)
    yield html.heading(3, "Recipe")
    yield html.folded("recipe.yaml, with every default", recipe.to_yaml())


def _loaded(run: Finished, device: torch.device | None) -> tuple[Student | None, LoadedTeacher | None, str]:
    """The student of the run and its teacher on that device, and the reason why one of them is None."""
    if device is None:
        return None, None, "the report was made with --no-draw"
    if not (run.folder / "student" / "config.json").is_file():
        return None, None, "the run has no student yet"
    try:
        student = load_student(run.folder).to(device)
    except ValueError as error:
        return None, None, str(error)
    try:
        return student, load_teacher(student), ""
    except ValueError as error:
        return student, None, f"Without the teacher: {error}"


def _samples(run: Finished, student: Student | None, teacher: LoadedTeacher | None, why: str) -> Iterator[str]:
    """The last samples that the run drew, otherwise some drawn now."""
    drawn = sorted((run.folder / "samples").glob("step-*"))
    if drawn:
        step = int(drawn[-1].stem.removeprefix("step-"))
        yield html.paragraph(f"Drawn by the run after {step} training steps, all rows from the same noise.", note=True)
        if drawn[-1].suffix == ".png":
            yield html.image_of(drawn[-1].read_bytes(), "image/png", f"samples after {step} training steps")
        else:
            yield html.preformatted(drawn[-1].read_text(encoding="utf-8"))
        return
    if student is None:
        yield html.paragraph(f"None: {why}.", note=True)
        return
    yield from _drawn_now(student, teacher, why)


def _drawn_now(student: Student, teacher: LoadedTeacher | None, why: str) -> Iterator[str]:
    try:
        found = columns(student, teacher, num=DRAWN, steps=student.config.sampler.steps)
    except ValueError as error:
        yield html.paragraph(f"None: {error}.", note=True)
        return
    yield html.paragraph(f"Drawn for this report, all rows from the same noise. {why}", note=True)
    if student.config.text_autoencoder is not None:
        yield html.preformatted("\n".join(line for one in found for line in (f"# {one.label}", *one.samples)))
    else:
        grids = [to_grid(torch.as_tensor(one.samples).float(), columns=DRAWN) for one in found]
        yield html.picture(stack(grids, [one.label for one in found]), "samples")


def _figures(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The rows of metrics.json: distances to held-out samples, then those to training samples."""
    names, rows = tables.tabulated(metrics, LABELS)
    if not names:
        yield html.paragraph("Nothing was measured.", note=True)
        return
    places = [i for i, name in enumerate(names) if not name.endswith(TRAIN)] or range(len(names))
    yield html.table(["", *(names[i] for i in places)], [[key, *(row[i] for i in places)] for key, row in rows.items()])
    if "data" in metrics:
        yield html.paragraph(f"Note: {metrics['data']}.", note=True)


def _costs(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The seconds of drawing and the network calls of each row of metrics.json."""
    seconds, nfe = metrics.get("seconds", {}), metrics.get("nfe", {})
    rows = [(steps_label("student", int(k)), f"student_{k}", calls) for k, calls in nfe["student"].items()]
    if "teacher" in nfe:
        rows.append((steps_label("teacher", metrics["teacher"]["steps"]), "teacher", nfe["teacher"]))
    cells = [[label, str(calls), f"{seconds[key]:.4g}" if key in seconds else ""] for label, key, calls in rows]
    yield html.table(["", "network calls a sample", "seconds of drawing what was measured"], cells)


def _trajectory(student: Student | None, teacher: LoadedTeacher | None, why: str) -> Iterator[str]:
    """The states along the teacher's path and the student's jumps, as a sheet and as an animation."""
    if student is None:
        yield html.paragraph(f"Not drawn: {why}.", note=True)
        return
    try:
        found = ways(student, teacher, steps=sorted(set(student.config.sampler.steps), reverse=True))
    except ValueError as error:
        yield html.paragraph(f"Not drawn: {error}.", note=True)
        return
    what = "Time falls from 1 (noise) on the left to 0 (data); a student's cell shows where a jump has arrived."
    yield html.paragraph(f"{what} {why}", note=True)
    yield html.picture(sheet(found), "states from noise to data")
    yield html.image_of(animation(found), "image/gif", "the same as an animation")


def _training(run: Finished) -> dict[str, float]:
    """Seconds and steps of training and its peak memory; without a clock's figures the seconds of the logged steps.

    A step's seconds are without pauses for pictures and figures, and all calls of a resumed run are counted.
    """
    known = run.metrics.get("training")
    if known is not None:
        return {key.replace("peak_gib", "peak memory, GiB"): value for key, value in known.items()}
    seconds, done = 0.0, 0
    for row in _log(run):
        step = int(row["step"]) + 1
        seconds += (step - done) * float(row.get("speed/step_seconds", 0.0))
        done = step
    return {"seconds": seconds, "steps": done} if done else {}


def _log(run: Finished) -> list[dict[str, str]]:
    """The rows of log.csv; [] without it."""
    path = run.folder / "log.csv"
    return read_log(path) if path.is_file() else []


def _seconds(run: Finished) -> str:
    found = _training(run)
    return f"{found['seconds']:.4g}" if "seconds" in found else ""
