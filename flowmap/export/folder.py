"""An exported folder is there whole or not at all: it is filled beside its place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmap.files import check_writable, naming, read_json, write_json

MARK = "flowmap_export.json"


@contextmanager
def whole_folder(out: Path, note: Mapping[str, Any], *, overwrite: bool, mark: str = MARK, what: str = "export") -> Iterator[Path]:
    """Gives a new folder to fill; at the end it stands at `out`, `note` in it under the name `mark`. On any failure `out` is as it was.

    Raises ValueError where `out` is there already, unless it is empty, or an earlier one (`what`) and `overwrite` is set.
    """
    check_free(out, overwrite, mark=mark, what=what)
    out = out.absolute()
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        with naming(out):
            beside.mkdir(parents=True)
            yield beside
            write_json(beside / mark, note)
            _flush(beside)
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(beside, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(out: Path, overwrite: bool, *, mark: str = MARK, what: str = "export") -> None:
    """ValueError unless it may be written to `out`."""
    check_writable(out.parent, "--out")
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise ValueError(f"--out: {out} is there and is no folder")
    if not any(out.iterdir()):
        return
    if not (out / mark).is_file():
        raise ValueError(f"--out: {out} holds something that is no {what} of flowmap's; choose another folder")
    if not overwrite:
        raise ValueError(f"--out: {out} holds an earlier {what} of {read_json(out / mark).get('recipe', 'a student')!r}; --overwrite replaces it")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
