"""An exported folder is there whole or not at all: it is filled beside its place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmap.base.files import check_writable, naming, read_json, write_json

MARK = "flowmap_export.json"
FILES = "files"  # in the note: the files that were written


@contextmanager
def whole_folder(
    out: Path, note: Mapping[str, Any], *, overwrite: bool, mark: str = MARK, what: str = "export"
) -> Iterator[Path]:
    """Gives a new folder to fill; at the end it stands at `out`, `note` and the names of its files in it under the name `mark`. On any failure
    `out` is as it was.

    Raises ValueError where `out` is there already, unless it is empty, or an earlier one (`what`) with no files but its own and `overwrite` is set.
    """
    check_free(out, overwrite, mark=mark, what=what)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        with naming(out):
            temporary.mkdir(parents=True)
            yield temporary
            write_json(temporary / mark, {**note, FILES: _files(temporary)})
            _flush(temporary)
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(temporary, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    note = read_json(out / mark)
    if not overwrite:
        raise ValueError(
            f"--out: {out} holds an earlier {what} of {note.get('recipe', 'a student')!r}; --overwrite replaces it"
        )
    if not isinstance(note.get(FILES), list):
        raise ValueError(
            f"--out: {out} holds an {what} of version 0.1, which did not note its files; remove it or choose another folder"
        )
    if others := [name for name in _files(out) if name not in (*note[FILES], mark)]:
        raise ValueError(
            f"--out: {out} holds {others[0]}, which no {what} wrote and --overwrite would remove; choose another folder"
        )


def _files(folder: Path) -> list[str]:
    """The names of all files and links below the folder."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
