"""`flowmap plot` and `report`: draw the loss, norms and metrics of runs, from log.csv and metrics.json.

Only this file imports matplotlib (extra `bench`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from flowmap.base.files import check_writable, write_beside
from flowmap.compare.finished import Finished, labelled, read_runs
from flowmap.metrics import TRAIN
from flowmap.train.csv_log import read_log

LOGGED = {"train/loss": "loss", "train/residual_norm": "residual norm"}
REPORTED = {**LOGGED, "train/tangent_norm": "tangent norm"}  # of `flowmap report`
MADE_BY = "flowmap plot"  # in the PNG's `Software`, by which a plot of flowmap's is recognised
ACROSS, WIDTH, HEIGHT = 3, 4.6, 3.4  # panels in a row; inches of a panel
STYLES = ("-", "--", ":", "-.")  # one for each ten runs

Points = tuple[list[float], list[float]]
Panel = Callable[[Any], None]  # draws on matplotlib's Axes


def plot_runs(folders: Sequence[str | Path], out: str | Path, *, metrics: Sequence[str] | None = None) -> Path:
    """Write a PNG with a panel for the loss, one for the residual norm if a run logged it, and one for each metric.

    metrics: their names in metrics.json; default the first one that the runs have. Runs that are not finished have no
    line there. Raises ValueError for a user's mistake.
    """
    path = Path(out)
    _check_file(path)
    runs = read_runs(folders, unfinished=True)
    logs = [_log_of(run.folder / "log.csv") for run in runs]
    panels = _panels(runs, logs, LOGGED, _chosen(runs, metrics))
    if not panels:
        raise ValueError("plot: these runs have logged no step yet")
    figure = _figure(panels)
    options = dict(format="png", dpi=120, metadata={"Software": MADE_BY})
    write_beside(path, lambda temporary: figure.savefig(temporary, **options))
    return path


def curves_png(runs: Sequence[Finished]) -> bytes | None:
    """The PNG of `flowmap report`: loss, norms, and every metric of held-out samples. None if nothing is logged yet."""
    logs = [_log_of(run.folder / "log.csv", REPORTED) if (run.folder / "log.csv").is_file() else {} for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.metric_names() if not name.endswith(TRAIN))
    panels = _panels(runs, logs, REPORTED, [*names])
    if not panels:
        return None
    file = io.BytesIO()
    _figure(panels).savefig(file, format="png", dpi=110)
    return file.getvalue()


def _panels(
    runs: Sequence[Finished], logs: Sequence[dict[str, Points]], logged: Mapping[str, str], metrics: Sequence[str]
) -> list[Panel]:
    """A panel for each of `logged` (keys of log.csv and their titles) that a run has, and one for each metric."""
    there = [key for key in logged if any(key in log for log in logs)]
    panels: list[Panel] = [partial(_draw_logged, key, logged[key], runs, logs) for key in there]
    return panels + [partial(_draw_metric, name, runs) for name in metrics]


def _check_file(path: Path) -> None:
    check_writable(path.parent, "--out")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out: {path}: must end in .png")
    if not path.exists():
        return
    try:
        with Image.open(path) as picture:
            ours = picture.info.get("Software") == MADE_BY
    except (UnidentifiedImageError, OSError):
        ours = False
    if not ours:
        raise ValueError(f"--out: {path} is there and is no plot of flowmap's; choose another file")


def _log_of(path: Path, logged: Mapping[str, str] = LOGGED) -> dict[str, Points]:
    """The steps and values of each key in `logged` that the log has."""
    if not path.is_file():
        raise ValueError(f"{path}: is not there, and has what would be drawn")
    found: dict[str, Points] = {}
    try:
        for row, key in ((row, key) for row in read_log(path) for key in logged if key in row):
            steps, values = found.setdefault(key, ([], []))
            steps.append(int(row["step"]) + 1)  # log.csv counts from 0
            values.append(float(row[key]))
    except ValueError as error:
        raise ValueError(f"{path}: is not the log of a run: {error}") from error
    return found


def _chosen(runs: Sequence[Finished], metrics: Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    for name in metrics or ():
        if name not in there:
            raise ValueError(f"--metrics: no run has {name!r}; there are {', '.join(there) or 'none'}")
    return list(dict.fromkeys(metrics)) if metrics else there[:1]


def _figure(panels: Sequence[Panel]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: needs matplotlib: pip install 'flowmap-distillation[bench]'") from error
    across = 2 if len(panels) == 4 else min(len(panels), ACROSS)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * down + 0.4), layout="constrained")
    for i, draw in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        draw(axes)
        axes.grid(alpha=0.3)
    known: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(
        known.values(),
        known.keys(),
        loc="outside lower center",
        ncols=min(len(known), 2 * across),
        fontsize="small",
        frameon=False,
    )
    return figure


def _draw_logged(key: str, title: str, runs: Sequence[Finished], logs: Sequence[dict[str, Points]], axes: Any) -> None:
    for i, (run, log) in enumerate(zip(runs, logs, strict=True)):
        if key in log:
            marker = "o" if len(log[key][0]) == 1 else None
            axes.plot(*log[key], color=f"C{i % 10}", linestyle=_style(i), label=run.name, linewidth=1.2, marker=marker)
    axes.set(title=title, xlabel="training step")
    _logarithmic(axes, [value for log in logs if key in log for value in log[key][1]])


def _draw_metric(name: str, runs: Sequence[Finished], axes: Any) -> None:
    drawn: list[float] = []
    for i, run in enumerate(runs):
        points = {k: figures[name] for k, figures in run.student.items() if name in figures}
        if points:
            how: dict[str, Any] = dict(color=f"C{i % 10}", linestyle=_style(i), marker="o", markersize=4)
            axes.plot([*points], [*points.values()], label=run.name, **how)
            drawn += points.values()
    for label, run in labelled("teacher", runs, [_level_of_teacher(run, name) for run in runs]):
        assert run.teacher is not None, "labelled gives those that have one"
        num_steps, row = run.teacher
        drawn.append(_level(axes, row[name], f"{label}, {num_steps} steps", label, runs.index(run), "--"))
    for label, run in labelled("real against real", runs, [run.baseline.get(name) for run in runs]):
        drawn.append(_level(axes, run.baseline[name], label, label, runs.index(run), ":"))
    steps = sorted({k for run in runs for k in run.student})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(k) for k in steps], minor=False)
    axes.set(title=name, xlabel="sampling steps")
    _logarithmic(axes, drawn)


def _level_of_teacher(run: Finished, name: str) -> tuple[int, float] | None:
    """The teacher's number of steps and its figure."""
    return None if run.teacher is None or name not in run.teacher[1] else (run.teacher[0], run.teacher[1][name])


def _level(axes: Any, value: float, label: str, shared: str, place: int, style: str) -> float:
    """Draw a horizontal line, grey if all runs share it, otherwise in its run's colour; returns its value."""
    colour = f"C{place % 10}" if shared.endswith(")") else "0.4"
    axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=label)
    return value


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """Set a logarithmic vertical axis if the values are positive and span a factor of ten."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")


def _style(number: int) -> str:
    return STYLES[number // 10 % len(STYLES)]
