"""SHA-256 checksums of the files in a folder of shards (shards.py). Each file is read once, and again after a change.

`checked.json` records the size, inode and modification time of each file at its last successful check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from flowmap.base.files import file_digest

CHECKED = "checked.json"
THREADS = 8


def check(folder: Path, wanted: Mapping[str, str], verb: str, *, again: bool = False) -> None:
    """Raise ValueError for the first file with another SHA-256 than in `wanted` (name: hexadecimal), naming the verb
    that makes it.

    Files that have not changed since a successful check are not read, unless `again`.
    """
    before = {} if again else _checked(folder)
    stamps = {name: _stamp(folder / name) for name in wanted}
    unchecked = [name for name in wanted if before.get(name) != [wanted[name], *stamps[name]]]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for name, found in zip(unchecked, pool.map(lambda name: file_digest(folder / name), unchecked), strict=True):
            if found != wanted[name]:
                what = f"its SHA-256 is {found[:12]}, not {wanted[name][:12]}"
                raise ValueError(f"{folder / name}: is torn or damaged: {what}; delete it and run `{verb}`")
    if unchecked:
        _keep(folder, before | {name: [wanted[name], *stamps[name]] for name in unchecked})


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns


def _checked(folder: Path) -> dict[str, list]:
    try:
        found = json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(folder: Path, stamps: Mapping[str, list]) -> None:
    """Write checked.json. In a folder without write permission, every opening checks again."""
    temporary = folder / f".{CHECKED}.{os.getpid()}.tmp"
    with suppress(OSError):
        temporary.write_text(json.dumps(stamps), encoding="utf-8")
        os.replace(temporary, folder / CHECKED)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
