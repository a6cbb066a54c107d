"""What the command line prints: figures as a table, lines of progress, warnings."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flowmap.base.distributed import is_child


def log(message: str) -> None:
    """Print a line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each different UserWarning once, as one line on stderr without the code that gave it."""
    printed: set[str] = set()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when peft imports it, it recommends a package
    with warnings.catch_warnings():
        shown_else = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            text = " ".join(str(message).split())
            if not issubclass(category, UserWarning):
                shown_else(message, category, filename, lineno, file, line)
            elif text not in printed and not is_child():
                printed.add(text)
                print(f"flowmap: warning: {text}", file=file or sys.stderr)

        warnings.showwarning = show
        yield


LABELS = {
    "student": "student {steps}",
    "teacher_few": "teacher {steps}",
    "teacher": "teacher {steps}",
    "floor": "floor",
    "spread": "floor's spread",
}


def summary(metrics: Mapping[str, Any]) -> str:
    """metrics.json as a table with a row for each number of steps."""
    from flowmap.evaluation.tables import tabulated

    names, rows = tabulated(metrics, LABELS)
    widths = [max(12, len(name) + 2) for name in names]
    lines = []
    for label, cells in [("steps", names), *rows.items()]:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(label.ljust(14) + "".join(padded))
    if "data" in metrics:
        lines.append(f"note: {metrics['data']}")
    return "\n".join(lines)
