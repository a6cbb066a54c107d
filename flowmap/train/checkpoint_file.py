"""The file of a checkpoint: torch's zip of tensors, with a SHA-256 of everything before it in the zip's comment.

A file that is not whole is refused. torch checks no checksum when it reads; files of flowmap 0.1 have none and are read
without one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowmap.base.files import write_beside
from flowmap.base.schema import RecipeError

MARK = b"flowmap sha256 "
NO_COMMENT = b"\0\0"  # the end of an archive without a comment
SEAL = len(MARK) + 64  # bytes of the comment, the last of the file
NEEDED = {
    "state_dict": dict,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write to a temporary file, add the checksum, then rename atomically."""

    def write(temporary: Path) -> None:
        torch.save(state, temporary)
        _seal(temporary)

    write_beside(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in that file, which is read without unpickling anything but tensors and plain containers.

    Raises ValueError, with the file's name, if it is torn, changed, hostile or not a checkpoint.
    """
    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a foreign pickle's protocol; the error below is clear enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # the restricted unpickler raises many kinds of errors on a foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path}: is not a whole checkpoint (torn, changed, or holds more than tensors): {reason}"
        ) from error
    _check_entries(path, state)
    return state


def checkpoint_step(path: Path) -> int:
    """The step after which the checkpoint was taken. ValueError if it cannot be read."""
    return int(read_checkpoint(path)["global_step"])


@contextmanager
def restoring(path: Path | None, begun: Callable[[], bool]) -> Iterator[None]:
    """Raise RecipeError with the file's name if resuming from it fails before training has begun: it does not fit."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if path is None or begun() or isinstance(error, RecipeError):
            raise
        what = (str(error).strip() or "?").splitlines()[0]
        raise RecipeError(f"--resume: {path}: cannot be restored: {type(error).__name__}: {what}") from error


def has_checksum(path: Path) -> bool:
    with open(path, "rb") as handle:
        return _sealed_with(handle, os.path.getsize(path)) is not None


def _seal(path: Path) -> None:
    """The end of a zip is its comment, and the two bytes before it are the comment's length: 0 in torch's files."""
    size = os.path.getsize(path)
    with open(path, "r+b") as handle:
        handle.seek(size - 2)
        assert handle.read(2) == NO_COMMENT, "torch writes a zip without a comment"
        handle.seek(size - 2)
        handle.write(SEAL.to_bytes(2, "little"))
        digest = _digest(handle, size)
        handle.seek(size)
        handle.write(MARK + digest)


def check_file(path: Path) -> None:
    """Raise ValueError unless it is a regular file with a matching checksum and an archive that unpacks to its size."""
    there = os.stat(path)
    if not stat.S_ISREG(there.st_mode):
        raise ValueError("is not a regular file")
    with open(path, "rb") as handle:
        if handle.read(2) != b"PK":
            raise ValueError("is no archive of torch's")
        try:
            entries = zipfile.ZipFile(handle).infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"is torn: {error}") from error
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > there.st_size:
            raise ValueError("unpacks to more than it is, which no checkpoint of ours does")
        said = _sealed_with(handle, there.st_size)
        if said is None and not _last_bytes(handle, there.st_size, 2) == NO_COMMENT:
            raise ValueError("its checksum is torn off")
        if said is not None and said != _digest(handle, there.st_size - SEAL):
            raise ValueError("its checksum (SHA-256) is not that of its content")


def _sealed_with(handle, size: int) -> bytes | None:
    found = _last_bytes(handle, size, SEAL)
    return found[len(MARK) :] if found.startswith(MARK) else None


def _last_bytes(handle, size: int, count: int) -> bytes:
    handle.seek(max(0, size - count))
    return handle.read(count)


def _digest(handle, size: int) -> bytes:
    """The SHA-256 of the first `size` bytes, as text."""
    handle.seek(0)
    digest, left = hashlib.sha256(), size
    while left:
        part = handle.read(min(left, 1 << 22))
        if not part:
            raise ValueError("ends before its end")
        digest.update(part)
        left -= len(part)
    return digest.hexdigest().encode()


def _check_entries(path: Path, state: Any) -> None:
    if not isinstance(state, dict) or not {"state_dict", "global_step", "optimizer_states"} <= set(state):
        raise ValueError(f"{path}: is not a checkpoint of a flowmap run")
    for name, kind in NEEDED.items():
        if not isinstance(state.get(name), kind) or isinstance(state.get(name), bool):
            raise ValueError(f"{path}: {name}: {'is not what a checkpoint holds' if name in state else 'is missing'}")
    if not all(isinstance(value, torch.Tensor) for value in state["state_dict"].values()):
        raise ValueError(f"{path}: state_dict: holds more than tensors")
    if state["global_step"] < 0 or state["epoch"] < 0:
        raise ValueError(f"{path}: global_step: {state['global_step']} must be 0 or more")
