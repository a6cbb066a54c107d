"""Progress of long work: a bar where stderr is a terminal, lines elsewhere.

`Pace` decides when a line is due: at most one in 10 seconds, so that a log file stays short.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

PAUSE = 10.0  # seconds between two lines, at least

LogFunction = Callable[[str], None]
Now = Callable[[], float]


def on_terminal() -> bool:
    """Whether stderr is a terminal with columns, where a bar can be redrawn; containers have terminals without any."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # its size cannot be asked for
        return True


def duration(seconds: float) -> str:
    """Minutes and seconds, from an hour on with hours: 0:07, 4:28, 1:02:03."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """`due()` is true at most once in `pause` seconds, counted from the start or from the last time it was true."""

    def __init__(self, pause: float = PAUSE, now: Now = time.monotonic):
        self.pause, self.now = pause, now
        self.last = now()

    def due(self, *, always: bool = False) -> bool:
        at = self.now()
        if not always and at - self.last < self.pause:
            return False
        self.last = at
        return True


def paced(log: LogFunction, pace: Pace | None = None) -> LogFunction:
    """A log function that passes on at most one line in 10 seconds and drops the others."""
    pace = pace or Pace()

    def write(line: str) -> None:
        if pace.due():
            log(line)

    return write


class Progress:
    """`with Progress(898, "evaluating: student 2 steps", say) as count:`, then count(n) after every n samples.

    On a terminal it draws a bar.  Elsewhere it passes lines such as `evaluating: student 2 steps, 512/898` to `say`;
    work that is done before the first of them is due prints none.  Without `say` it shows nothing.
    """

    def __init__(
        self, total: int, label: str, log: LogFunction | None, *, unit: str = "sample", pace: Pace | None = None
    ):
        self.total, self.label, self.log, self.unit = total, label, log, unit
        self.pace, self.done = pace or Pace(), 0
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], None]:
        if self.log is not None and on_terminal():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.label, unit=self.unit, dynamic_ncols=True, leave=False)
        return self.count

    def count(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.log is not None and self.pace.due():
            self.log(f"{self.label}, {self.done}/{self.total}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
