"""What the command line shows: figures as a table, a progress bar, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from flowmap.base.distributed import is_child


def log(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within it each different UserWarning is one line on stderr, once, and without the code that gave it."""
    said = set()
    with warnings.catch_warnings():
        shown_else = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            text = " ".join(str(message).split())
            if not issubclass(category, UserWarning):
                shown_else(message, category, filename, lineno, file, line)
            elif text not in said and not is_child():
                said.add(text)
                print(f"flowmap: warning: {text}", file=file or sys.stderr)

        warnings.showwarning = show
        yield


def summary(metrics: dict) -> str:
    """metrics.json as a table, a row for each number of steps."""
    from flowmap.metrics.baseline import spread_of

    rows = {f"student {k}": row for k, row in metrics["student"].items()}
    rows |= {f"teacher {k}": row for k, row in metrics.get("teacher_few", {}).items()}
    if "teacher" in metrics:
        rows[f"teacher {metrics['teacher']['steps']}"] = metrics["teacher"]
    rows["floor"] = metrics["floor"]
    if spread := spread_of(metrics["floor"]):
        rows["floor's spread"] = spread
    names = list(dict.fromkeys(name for row in metrics["student"].values() for name in row))
    lines = ["steps".ljust(14) + "".join(name.rjust(max(12, len(name) + 2)) for name in names)]
    for label, row in rows.items():
        cells = (f"{row[name]:.4g}" if name in row else "" for name in names)
        padded = (cell.rjust(max(12, len(name) + 2)) for cell, name in zip(cells, names, strict=True))
        lines.append(label.ljust(14) + "".join(padded))
    return "\n".join(lines)
