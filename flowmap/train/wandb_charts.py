"""What W&B shows of a run beside its plain curves: charts of the finished run, and the best figures so far.

A chart is logged once, by wandb.plot, and works offline. The plain key of a metric keeps its last value, which is that
of the student that ships; a sweep can optimise either key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowmap.base.images import steps_label
from flowmap.metrics import TRAIN
from flowmap.metrics.direction import direction

MOMENTS = 5  # training steps in a chart of figures by time
BY_TIME = re.compile(r"by_time/(.+)_t(\d\.\d\d)-(\d\.\d\d)")


@dataclass(frozen=True)
class Chart:
    """Lines of (x, y) points by their names; logged as `charts/NAME`."""

    name: str
    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def charts_of(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> list[Chart]:
    """The charts of a finished run. metrics: the contents of metrics.json; rows: those of log.csv."""
    return [*_by_steps(metrics), *_by_time(rows)]


def _by_steps(metrics: Mapping[str, Any]) -> Iterable[Chart]:
    """Each metric against the number of steps, with the levels of the teacher and of real samples."""
    student = metrics["student"]
    if len(student) < 2:
        return
    names = dict.fromkeys(name for row in student.values() for name in row)
    for name in [one for one in names if not one.endswith(TRAIN)] or names:
        lines = {"student": _points((int(k), row.get(name)) for k, row in student.items())}
        lines["teacher"] = _points((int(k), row.get(name)) for k, row in metrics.get("teacher_few", {}).items())
        many = metrics.get("teacher", {})
        for label, row in ((steps_label("teacher", many.get("steps", 0)), many), ("real", metrics.get("floor", {}))):
            lines[label] = _points((int(k), row.get(name)) for k in student)
        yield Chart(f"{name}_by_steps", f"{name} by number of steps", "steps", _drawn(lines))


def _by_time(rows: Sequence[Mapping[str, str]]) -> Iterable[Chart]:
    """Each figure that is logged by time t, at some training steps, at the middle of each bin of t."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if parts := BY_TIME.fullmatch(key):
                name, low, high = parts.groups()
                step = int(row["step"]) + 1  # log.csv counts from 0
                found.setdefault(name, {}).setdefault(step, []).append(((float(low) + float(high)) / 2, float(value)))
    for name, steps in found.items():
        lines = {f"step {step}": _points(sorted(steps[step])) for step in _some(sorted(steps))}
        yield Chart(f"{name}_by_time", f"{name} by time (0 data, 1 noise)", "t", _drawn(lines))


def _some(steps: Sequence[int]) -> list[int]:
    """At most MOMENTS of the steps, even ones, the first and the last among them."""
    last = len(steps) - 1
    return [steps[i] for i in dict.fromkeys(round(last * i / (MOMENTS - 1)) for i in range(MOMENTS))]


def _points(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _drawn(lines: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Sequence[tuple[float, float]]]:
    return {name: points for name, points in lines.items() if points}


class Best:
    """The best value so far of each metric whose better direction is known, under best/... instead of metrics/..."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        """rows: what was logged before."""
        self.values: dict[str, float] = {}
        for row in rows:
            self.update(row)

    def update(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Take more values; returns those that are new best ones."""
        new = {}
        for key, value in logs.items():
            group, _, rest = key.partition("/")
            sign = -direction(rest)
            if not (group == "metrics" or group.startswith("metrics_of_")) or not sign:
                continue
            name, value = f"{group.replace('metrics', 'best', 1)}/{rest}", float(value)
            if math.isfinite(value) and sign * value < sign * self.values.get(name, sign * math.inf):
                new[name] = self.values[name] = value
        return new
