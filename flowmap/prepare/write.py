"""Write a folder of shards (data/shards.py) that survives an interruption at any moment.

A second call completes the folder. A shard is a function of its number alone, so any process may make it, any number
of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from flowmap.base.files import file_digest, only_process, read_json, write_beside, write_json
from flowmap.data.encoded import EMPTY, REFERENCE
from flowmap.data.shards import INDEX, PLAN, difference, shard_name

T = TypeVar("T")
OURS = (INDEX, "shard-[0-9][0-9][0-9][0-9][0-9].*", EMPTY, REFERENCE)  # the files written after the plan


@contextmanager
def making(folder: Path, shard: tuple[int, int], waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock on part I of N of the folder, so that only this process makes it.

    Raises ValueError for a part that does not exist, or that another process makes; with `waiting` (base/files.py),
    wait for that process.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard: {rank}/{world} must be I/N with 0 <= I < N")
    lock = folder / f".process-{rank}-of-{world}"
    with only_process(lock, waiting):
        try:
            yield
        finally:
            for empty in (lock, folder):  # Also remove the folder if nothing was written.
                with suppress(OSError):
                    empty.rmdir()


def check_plan(folder: Path, plan: Mapping[str, Any], thing: str, changes: tuple[str, ...] = ()) -> None:
    """Write the plan of the folder. Raise ValueError if the folder is of something else, or its source has changed.

    changes: the keys of the plan that describe the source.
    """
    if not (folder / PLAN).is_file():
        foreign = next((path.name for pattern in OURS for path in sorted(folder.glob(pattern))), None)
        if foreign is not None:
            raise ValueError(
                f"{folder}: holds {foreign} without a {PLAN}: no {thing} was begun here; choose another folder"
            )
        write_json(folder / PLAN, plan)
    found = difference(read_json(folder / PLAN), plan)
    if found:
        what = (
            "its source has changed since it was begun"
            if changes and found.startswith(changes)
            else f"holds another {thing}"
        )
        raise ValueError(f"{folder}: {what}: {found}; choose another folder, or delete this one")


def whole(folder: Path, number: int, suffix: str = ".arrow") -> dict[str, Any] | None:
    """Return the summary of a shard from its .json; None if the shard is missing or truncated."""
    path = folder / shard_name(number, suffix)
    try:
        summary = read_json(path.with_suffix(".json"))
        return summary if path.stat().st_size == summary["bytes"] else None
    except (ValueError, KeyError, OSError):
        return None


def write_shard(
    folder: Path, number: int, write: Callable[[Path], None], summary: Mapping[str, Any], suffix: str = ".arrow"
) -> dict[str, Any]:
    """Write the summary (.json) of a shard, then the shard; return the summary with its bytes and SHA-256."""
    path = folder / shard_name(number, suffix)
    for stale in folder.glob(f".{path.stem}.*.tmp"):  # An interrupted process wrote it.
        stale.unlink(missing_ok=True)

    def both(temporary: Path) -> None:
        write(temporary)
        write_json(path.with_suffix(".json"), {**summary, **measured(temporary)})

    write_beside(path, both)
    return read_json(path.with_suffix(".json"))


def measured(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as in index.json."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def once(folder: Path, finish: Callable[[], T]) -> T | None:
    """Return finish(), or None if another process does it just now."""
    lock = folder / ".process-last"
    with ExitStack() as stack:
        try:
            stack.enter_context(only_process(lock))
        except ValueError:
            return None
        done = finish()
        with suppress(OSError):
            lock.rmdir()
    return done


def sweep_stale(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files of those names that an interrupted process wrote; for the process that runs `once`."""
    for name in names:
        for stale in folder.glob(f".{name}.*.tmp"):
            stale.unlink(missing_ok=True)
