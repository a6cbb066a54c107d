"""Writing a folder of shards (data/shards.py) so that it may be killed at any moment: a second call completes what is there.

A shard is a function of its number alone, so it does not matter which process makes it, or how often.
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
OURS = (INDEX, "shard-[0-9][0-9][0-9][0-9][0-9].*", EMPTY, REFERENCE)  # what is written after the plan


@contextmanager
def making(folder: Path, shard: tuple[int, int], waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Within it this process alone makes part I of N of the folder; ValueError for a part that there is not, or that another is making, for
    which it waits with `waiting` (base/files.py)."""
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard: {rank}/{world} must be I/N with 0 <= I < N")
    lock = folder / f".process-{rank}-of-{world}"
    with only_process(lock, waiting):
        try:
            yield
        finally:
            for empty in (lock, folder):  # the folder goes where nothing could be begun
                with suppress(OSError):
                    empty.rmdir()


def check_plan(folder: Path, plan: Mapping[str, Any], thing: str, changes: tuple[str, ...] = ()) -> None:
    """Writes down what is being made; ValueError where the folder holds something else, or its source (`changes`) has changed since."""
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


def whole(folder: Path, number: int) -> dict[str, Any] | None:
    """What a shard's .json says of it; None where the shard is not there, or not whole."""
    path = folder / shard_name(number)
    try:
        summary = read_json(path.with_suffix(".json"))
        return summary if path.stat().st_size == summary["bytes"] else None
    except (ValueError, KeyError, OSError):
        return None


def write_shard(folder: Path, number: int, write: Callable[[Path], None], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one shard, first what it holds (.json), then the shard itself; gives the former, its bytes and SHA-256 among it."""
    path = folder / shard_name(number)
    for stale in folder.glob(f".{path.stem}.*.tmp"):  # of a killed process: this one alone makes the shard now
        stale.unlink(missing_ok=True)

    def both(temporary: Path) -> None:
        write(temporary)
        write_json(path.with_suffix(".json"), {**summary, **measured(temporary)})

    write_beside(path, both)
    return read_json(path.with_suffix(".json"))


def measured(path: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file, as index.json keeps them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def once(folder: Path, finish: Callable[[], T]) -> T | None:
    """finish(), unless another process is at it just now: None."""
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
    """Removes the temporary files of those names that a killed process left; for the one that holds `once`."""
    for name in names:
        for stale in folder.glob(f".{name}.*.tmp"):
            stale.unlink(missing_ok=True)
