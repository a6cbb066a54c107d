"""Atomic writing of a folder: fill a temporary folder, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmap.base.files import check_writable, naming, read_json, write_json

STAMP = "flowmap_export.json"
FILES = "files"  # key of the note: the files that were written


@contextmanager
def whole_folder(
    out: Path, note: Mapping[str, Any], *, overwrite: bool, stamp: str = STAMP, what: str = "export"
) -> Iterator[Path]:
    """A context with a new folder to fill, which is renamed to `out` at the end. On any failure `out` is unchanged.

    The file `stamp` in it contains `note` and the names of all files. Raises a ValueError if `out` exists, unless it is
    empty, or `overwrite` is set and it contains nothing except an earlier `what`.
    """
    check_free(out, overwrite, stamp=stamp, what=what)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        with naming(out):
            temporary.mkdir(parents=True)
            yield temporary
            write_json(temporary / stamp, {**note, FILES: _files(temporary)})
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


def check_free(out: Path, overwrite: bool, *, stamp: str = STAMP, what: str = "export") -> None:
    """Raise a ValueError unless the folder `out` can be written or replaced."""
    check_writable(out.parent, "--out")
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise ValueError(f"--out: {out} is there and is no folder")
    if not any(out.iterdir()):
        return
    if not (out / stamp).is_file():
        raise ValueError(f"--out: {out} holds something that is no {what} of flowmap's; choose another folder")
    note = read_json(out / stamp)
    if not overwrite:
        earlier = f"an earlier {what} of {note.get('recipe', 'a student')!r}"
        raise ValueError(f"--out: {out} holds {earlier}; --overwrite replaces it")
    if not isinstance(note.get(FILES), list):
        old = f"an {what} of version 0.1, which did not note its files"
        raise ValueError(f"--out: {out} holds {old}; remove it or choose another folder")
    if others := [name for name in _files(out) if name not in (*note[FILES], stamp)]:
        other = f"{others[0]}, which no {what} wrote and --overwrite would remove"
        raise ValueError(f"--out: {out} holds {other}; choose another folder")


def _files(folder: Path) -> list[str]:
    """The relative paths of all files and links in the folder."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
