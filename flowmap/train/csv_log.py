"""log.csv: one row a logged step, with numbers that read back bit-equal.

A resumed run drops the rows after its checkpoint.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from flowmap.base.files import naming, write_text


class CSVLog(Logger):
    """Appends a row per step; a new column rewrites the whole file atomically."""

    def __init__(self, path: Path, *, keep_below: int):
        super().__init__()
        self.path = path
        self.rows = [row for row in read_log(path) if int(row["step"]) < keep_below] if path.is_file() else []
        self.columns = list(dict.fromkeys(["step", *(key for row in self.rows for key in row)]))
        self._write()

    name, version, save_dir = "csv", "", None

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Do nothing: pictures are in samples/, not in the table."""

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """Do nothing: a table of samples is in samples/, not in this one."""

    def log_chart(self, chart: Any, step: int) -> None:
        """Do nothing: a chart has no figures of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{key: repr(float(value)) for key, value in metrics.items()}}
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1] |= row
            known = False
        else:
            self.rows.append(row)
            known = set(row) <= set(self.columns)
        self.columns += [key for key in row if key not in self.columns]
        if known:
            with (
                naming(self.path, kept="all rows but its last are whole"),
                open(self.path, "a", newline="", encoding="utf-8") as handle,
            ):
                csv.DictWriter(handle, self.columns).writerow(row)
        else:
            self._write()

    @rank_zero_only
    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows as text, without empty cells and without a torn last row."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    whole = [row for row in rows if None not in row and (row.get("step") or "").isdigit()]
    return [{key: value for key, value in row.items() if value not in ("", None)} for row in whole]
