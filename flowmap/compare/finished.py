"""Tables and a plot of finished runs, from the rows of their metrics.json. Nothing is trained or measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from flowmap.base.files import check_writable, read_json, write_json, write_text
from flowmap.base.images import save_picture
from flowmap.base.schema import RecipeError, to_plain
from flowmap.compare.entrants import data_settings
from flowmap.compare.plot import plot
from flowmap.compare.report import lines_of, note, spread, table
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import read_resolved

Row = Mapping[str, float]
REPORT = ("runs.json", "table.md", "quality.png")


@dataclass(frozen=True)
class Finished:
    """A run under its name in tables and plots, with its folder and its metrics.json ({} if there is none)."""

    name: str
    folder: Path
    metrics: Mapping[str, Any]

    @property
    def student(self) -> dict[int, Row]:
        """The student's rows by number of steps, in order."""
        rows = {int(k): figures_of(row) for k, row in self.metrics.get("student", {}).items()}
        return dict(sorted(rows.items()))

    @property
    def teacher(self) -> tuple[int, Row] | None:
        """The number of steps and the figures of the teacher's own row."""
        row = self.metrics.get("teacher")
        return None if row is None else (int(row["steps"]), figures_of(row))

    @property
    def teacher_few(self) -> dict[int, Row]:
        return {int(k): figures_of(row) for k, row in self.metrics.get("teacher_few", {}).items()}

    @property
    def baseline(self) -> Row:
        """The figures of real samples against real samples, with their standard deviations (`_std`)."""
        return figures_of(self.metrics.get("floor", {}))

    def metric_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.student.values() for name in row))


def figures_of(row: Mapping[str, Any]) -> Row:
    """The finite figures of a row of metrics.json."""
    return {key: float(value) for key, value in row.items() if key not in ("steps", "nfe") and math.isfinite(value)}


def read_runs(folders: Sequence[str | Path], *, unfinished: bool = False) -> list[Finished]:
    """The runs of those folders, named by them.

    Raises ValueError if one is no run folder, given twice, or not finished.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{path}: is not a run folder (no recipe.yaml)")
        if not (unfinished or (path / "metrics.json").is_file()):
            raise ValueError(f"{path}: is not finished: it has no metrics.json")
    same = next((one for one, other in combinations(paths, 2) if one.resolve() == other.resolve()), None)
    if same is not None:
        raise ValueError(f"{same}: is given twice")
    names = [path.resolve().name for path in paths]
    alike = len(set(names)) < len(names)
    return [_read(str(path) if alike else name, path) for name, path in zip(names, paths, strict=True)]


def _read(name: str, folder: Path) -> Finished:
    path = folder / "metrics.json"
    found = Finished(name, folder, read_json(path) if path.is_file() else {})
    try:
        found.student, found.teacher, found.teacher_few, found.baseline  # noqa: B018 (other files fail here)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not hold the figures of a run") from error
    return found


def compare_runs(
    folders: Sequence[str | Path],
    *,
    steps: Sequence[int] | None = None,
    out: str | Path | None = None,
) -> str:
    """The tables as Markdown, one for each metric; with `out`, write runs.json, table.md and quality.png there.

    steps: only those. Raises ValueError if the runs' data or metrics differ: their figures are then not comparable.
    """
    if out is not None:
        _check_out(Path(out))
    runs = read_runs(folders)
    if len(runs) < 2:
        raise ValueError("--runs: give two runs or more")
    check_alike(runs)
    found = tabulated(runs, steps)
    text = markdown(found, runs)
    if out is not None:
        write_json(Path(out) / "runs.json", found)
        write_text(Path(out) / "table.md", text)
        save_picture(Path(out) / "quality.png", plot(*lines_of(found, found["metrics"][0])))
    return text


def _check_out(folder: Path) -> None:
    check_writable(folder, "--out")
    if (folder / "recipe.yaml").is_file():
        raise ValueError(f"--out: {folder} is a run folder; choose another folder")
    foreign = [] if (folder / "runs.json").is_file() else [name for name in REPORT if (folder / name).exists()]
    if foreign:
        what = f"{folder} holds {foreign[0]} and no runs.json: compare --runs did not write it"
        raise ValueError(f"--out: {what}; choose another folder")


def check_alike(runs: Sequence[Finished]) -> None:
    """Raise RecipeError if the data or the metrics of the runs differ: their figures are then not comparable."""
    recipes = [read_resolved(run.folder / "recipe.yaml") for run in runs]
    classes = lambda recipe: {"evaluation.classes": recipe.evaluation.classes}
    metrics = lambda recipe: {"metrics": to_plain(recipe.metrics, TABLES), **classes(recipe)}
    for what, part_of in (("data", data_settings), ("metrics", metrics)):
        first = part_of(recipes[0])
        for run, recipe in zip(runs[1:], recipes[1:], strict=True):
            for key, mine, theirs in differences(first, part_of(recipe)):
                pair = f"{runs[0].name!r} and {run.name!r}"
                raise RecipeError(f"--runs: {pair} have different {what}: {key} is {mine!r} and {theirs!r}")
    for run in runs[1:]:
        mine, theirs = (one.metrics.get("data") for one in (runs[0], run))
        if mine != theirs:
            raise RecipeError(f"--runs: {runs[0].name!r} and {run.name!r} have different data: {mine}; {theirs}")


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, one value, other value) for each setting in which two plain values differ; None if it is missing."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in {**one, **other}:
            yield from differences(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{key}[{i}]")
    elif one != other:
        yield key, one, other


def tabulated(runs: Sequence[Finished], steps: Sequence[int] | None = None) -> dict[str, Any]:
    """The contents of runs.json, in the form of compare.json: each figure is a spread over one run."""
    there = sorted({k for run in runs for k in run.student})
    missing = [k for k in steps or () if k not in there]
    if missing:
        raise ValueError(f"--steps: no run was measured at {missing[0]} steps; there are {', '.join(map(str, there))}")
    chosen = [k for k in there if k in steps] if steps else there
    names = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    if not names:
        raise ValueError("--runs: none of them was measured by any metric")
    lines = {run.name: run.student for run in runs}
    levels: dict[str, Row] = {}
    for label, run in labelled("teacher", runs, [(run.teacher, run.teacher_few) for run in runs]):
        lines |= {label: run.teacher_few} if run.teacher_few else {}
        levels |= {f"{label}, {run.teacher[0]} steps": run.teacher[1]} if run.teacher else {}
    baselines = [run.baseline for run in runs]
    levels |= {label: run.baseline for label, run in labelled("real against real", runs, baselines)}
    spreads = lambda row: {name: spread([value]) for name, value in row.items() if not name.endswith("_std")}
    figures = lambda rows: {str(k): spreads(rows.get(k, {})) for k in chosen}
    return {
        "runs": {run.name: str(run.folder) for run in runs},
        "terms": {"steps": chosen},
        "metrics": names,
        "recipes": {label: {"figures": figures(rows)} for label, rows in lines.items()},
        "beside": {label: spreads(row) for label, row in levels.items()},
        **({"data": runs[0].metrics["data"]} if "data" in runs[0].metrics else {}),
    }


def labelled(label: str, runs: Sequence[Finished], values: Sequence[Any]) -> list[tuple[str, Finished]]:
    """A run for each distinct value, labelled with the names of all runs that have it, or without if all have it."""
    empty: tuple[Any, ...] = (None, {}, (None, {}))
    groups: list[tuple[Any, list[Finished]]] = []
    for run, value in zip(runs, values, strict=True):
        having = next((those for other, those in groups if other == value), None)
        if having is not None:
            having.append(run)
        elif value not in empty:
            groups.append((value, [run]))
    if len(groups) == 1:
        return [(label, groups[0][1][0])]
    return [(f"{label} ({', '.join(run.name for run in those)})", those[0]) for _, those in groups]


def markdown(found: Mapping[str, Any], runs: Sequence[Finished]) -> str:
    """A table that describes the runs, and one for each metric."""
    heads = "| run | recipe | objective | train seconds |\n| --- | --- | --- | ---: |"
    parts = ["\n".join([heads, *map(_told, runs)])]
    parts += [f"{metric}\n\n{table(found, metric, costs=False)}" for metric in found["metrics"]]
    return "\n\n".join([*parts, *note(found)]) + "\n"


def _told(run: Finished) -> str:
    recipe = read_resolved(run.folder / "recipe.yaml")
    objective = to_plain(recipe.objective, TABLES)["kind"]
    seconds = run.metrics.get("seconds", {}).get("train")
    cells = [
        run.name,
        recipe.name,
        f"{objective}, {recipe.trainer.steps} steps",
        "" if seconds is None else f"{seconds:.4g}",
    ]
    return f"| {' | '.join(cells)} |"
