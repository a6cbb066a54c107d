"""Files are written beside and renamed: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmap.base.finite import check_finite
from flowmap.base.outside import bounded_text

POLL, MINUTE = 0.5, 60.0  # seconds between two looks at a lock, and between two messages about it


class WriteError(OSError):
    """A file that could not be written; what was there before is untouched."""


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), flushes it to disk and renames it to `path`; on any failure `path` is as it was (WriteError names it)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, RuntimeError):  # torch.save's error for a full disk
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def naming(path: Path, *others: type[Exception], kept: str = "nothing that was there is changed") -> Iterator[None]:
    """Within it, an error of writing (a full disk, say), or one of `others`, becomes a WriteError that names `path` and says what is `kept`."""
    from safetensors import SafetensorError

    caught: tuple[type[Exception], ...] = (OSError, SafetensorError, *others)
    try:
        yield
    except caught as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' way to give an errno
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else errno.EIO
        with suppress(
            OSError
        ):  # torch and safetensors do not say so: fewer than a megabyte is left beside the half-written file
            free = os.statvfs(path.parent if path.parent.is_dir() else ".")
            number = errno.ENOSPC if number == errno.EIO and free.f_bavail * free.f_frsize < 1 << 20 else number
        reason = (
            os.strerror(number)
            if number not in (None, errno.EIO)
            else (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        raise WriteError(number, f"cannot be written ({reason}); {kept}", str(path)) from error


def check_writable(folder: Path, key: str) -> None:
    """ValueError that names `key` where that folder is not there and cannot be made, or cannot be written to. Makes nothing."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise ValueError(f"{key}: {folder} cannot be a folder: {there} is not one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {there} may not be written to")


def real_folder(path: Path, key: str) -> Path:
    """The folder that the path names, a symbolic link followed once. ValueError that names `key` for a link that leads to no folder."""
    if not path.is_symlink():
        return path
    if not path.is_dir():
        raise ValueError(f"{key}: {path} is a symbolic link to {os.readlink(path)}, which is no folder")
    return path.resolve()


@contextmanager
def only_process(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Within it no other process fills the folder. The lock ends with its process, however that ends.

    Where another process has the lock: ValueError, or with `waiting` it waits; waiting() is called at once and then once a minute.
    """
    made = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    handle = _locked(folder, waiting)
    try:
        yield
    finally:
        for path in made:  # the folders that were made for the lock alone are removed again
            with suppress(OSError):
                path.rmdir()
        os.close(handle)


def _locked(folder: Path, waiting: Callable[[], None] | None) -> int:
    """An open descriptor of the folder, locked. The folder itself is locked, so no file is left behind."""
    said = -math.inf
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
            os.close(handle)  # the lock is on a folder that has been removed since
        except BlockingIOError as error:
            os.close(handle)
            if waiting is None:
                raise ValueError(
                    f"{folder}: another flowmap process is filling this folder; wait for it or choose another"
                ) from error
            if time.monotonic() - said >= MINUTE:
                said = time.monotonic()
                waiting()
            time.sleep(POLL)


def copy_folder(source: Path, target: Path, wanted: Callable[[Path], bool] = Path.is_file) -> None:
    """The files of a folder (those `wanted`), copied one by one beside and renamed; those that are there already in the same size are left."""
    for path in sorted(p for p in source.rglob("*") if p.is_file() and wanted(p)):
        there = target / path.relative_to(source)
        if not there.is_file() or there.stat().st_size != path.stat().st_size:
            write_beside(there, functools.partial(shutil.copyfile, path))


def write_text(path: Path, text: str) -> None:
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> None:
    """A safetensors file of those tensors: the same tensors give the same bytes (more than one entry of metadata would come in any order).
    finite: where one of them is not, ValueError, and the file is as it was."""
    from safetensors.torch import save_file

    if finite:
        check_finite(tensors, path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_beside(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite; ValueError, in one line that names the file, for anything else. Nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as handle:
            start = handle.read(2)
        if start[:1] == b"\x80" or start == b"PK":
            what = "is a pickle, not safetensors; flowmap unpickles nothing, so convert it with the tool that wrote it"
        else:
            what = f"is not a whole safetensors file (torn or not one): {str(error).splitlines()[0]}"
        raise ValueError(f"{path}: {what}") from error
    check_finite(tensors, path)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in that file; ValueError names the file otherwise."""
    text = bounded_text(path, "json")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value


def file_digest(path: str | Path) -> str:
    """The SHA-256 of that file, hexadecimal; its content is never held whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str, errors: str = "strict") -> str:
    """Sixteen hexadecimal digits of that text's SHA-256; errors: as str.encode has it."""
    return hashlib.sha256(text.encode("utf-8", errors)).hexdigest()[:16]


def weights_hash(where: Path | None) -> str | None:
    """SHA-256 over a file of weights, or all safetensors of a folder by name; None where there are none. About a second a gigabyte, once."""
    if where is None or not where.exists():
        return None
    files = [where] if where.is_file() else sorted(where.rglob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        state = os.stat(path)
        digest.update(_file_hash(str(path), state.st_size, state.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _file_hash(path: str, size: int, changed: int) -> str:
    return file_digest(path)
