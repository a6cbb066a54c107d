"""Progress reports: a bar if stderr is a terminal, otherwise lines.

`Pace` limits lines to one in 10 seconds, so that log files stay short.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

PAUSE = 10.0  # minimum seconds between two lines

LogFunction = Callable[[str], None]
Now = Callable[[], float]


def on_terminal() -> bool:
    """Whether stderr is a terminal in which a bar can be redrawn; the terminals of some containers have no columns."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # the size is unknown
        return True


def duration(seconds: float) -> str:
    """Seconds formatted as M:SS, or H:MM:SS from one hour: 0:07, 4:28, 1:02:03."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """A rate limit: `due()` is true at most once every `pause` seconds."""

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
    """Progress of one task: `with Progress(898, "evaluating: 2 steps", log) as count:`, then count(n) per n samples.

    On a terminal it draws a bar. Otherwise it passes lines such as `evaluating: 2 steps, 512/898, 43/s, 0:09 left` to
    `log`; short tasks, which end before the first line is due, print nothing. With `log` None it shows nothing.
    """

    def __init__(
        self, total: int, label: str, log: LogFunction | None, *, unit: str = "sample", pace: Pace | None = None
    ):
        self.total, self.label, self.log, self.unit = total, label, log, unit
        self.pace, self.done = pace or Pace(), 0
        self.began = self.pace.now()
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
            rate = self.done / max(self.pace.now() - self.began, 1e-9)
            left = duration((self.total - self.done) / rate)
            self.log(f"{self.label}, {self.done}/{self.total}, {rate:.3g}/s, {left} left")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
