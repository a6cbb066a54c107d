"""A file of figures that have been measured, so that a measurement that was cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from flowmap.base.files import read_json, write_json
from flowmap.base.progress import Pace

PAUSE = 5.0  # seconds between two writes

Figures = dict[str, float]


class Journal:
    """Figures by name, kept in a file from one call to the next while `stamp` is the same; in memory alone for None."""

    def __init__(self, path: Path | None, stamp: Mapping[str, Any]):
        self.path, self.stamp = path, dict(stamp)
        self.found: dict[str, Figures] = {}
        self.pace = Pace(PAUSE)
        if path is not None and path.is_file():
            with suppress(ValueError):  # a torn file is measured anew
                kept = read_json(path)
                self.found = dict(kept["found"]) if kept.get("stamp") == self.stamp else {}

    def get(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """The figures of that name, measured if they are not known."""
        if name not in self.found:
            self.found[name] = measure()
            if self.pace.due():
                self._write()
        return self.found[name]

    def done(self) -> None:
        """Remove the file: nothing is left to go on with."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.path = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.found:
            write_json(self.path, {"stamp": self.stamp, "found": self.found})
