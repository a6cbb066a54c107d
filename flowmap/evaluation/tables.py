"""The rows of metrics.json as a table, for the terminal and for model cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowmap.metrics.baseline import spread_of


def tabulated(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """(The names of the student's metrics, a row of cells under each label).

    labels: a format string for each kind of row: student, teacher_few, teacher, floor, spread. It may have {steps}, {s}
    (the plural of step) and {nfe}. A kind without a label has no row.
    """
    names = list(dict.fromkeys(name for row in metrics["student"].values() for name in row))
    rows = {}
    for kind, steps, row in _rows(metrics):
        if kind in labels:
            label = labels[kind].format(steps=steps, s="" if steps == "1" else "s", nfe=row.get("nfe"))
            rows[label] = [f"{row[name]:.4g}" if name in row else "" for name in names]
    return names, rows


def _rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(kind, number of steps, figures) of each row, in the order of a table."""
    yield from (("student", k, row) for k, row in metrics["student"].items())
    yield from (("teacher_few", k, row) for k, row in metrics.get("teacher_few", {}).items())
    if "teacher" in metrics:
        yield "teacher", str(metrics["teacher"]["steps"]), metrics["teacher"]
    yield "floor", "", metrics["floor"]
    if spread := spread_of(metrics["floor"]):
        yield "spread", "", spread
