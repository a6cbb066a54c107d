"""Atomic file writes, locks and hashes. Write to a temporary file, then rename it: readers never see half a file."""

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

POLL, MINUTE = 0.5, 60.0  # seconds between two attempts to lock, and between two messages about waiting


class WriteError(OSError):
    """A file could not be written; its previous content is unchanged."""


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), flush the file to disk and rename it to `path`.

    On any failure `path` keeps its previous content, and a WriteError names it.
    """
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
    """A context that turns errors of writing (such as a full disk) and `others` into a WriteError.

    The error names `path` and ends with `kept`, which describes what remains intact.
    """
    from safetensors import SafetensorError

    caught: tuple[type[Exception], ...] = (OSError, SafetensorError, *others)
    try:
        yield
    except caught as error:
        match = re.search(r"\(os error (\d+)\)", str(error))  # safetensors gives the errno in its message
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else errno.EIO
        # torch and safetensors do not report a full disk: less than a megabyte of free space is taken for one
        with suppress(OSError):
            free = os.statvfs(path.parent if path.parent.is_dir() else ".")
            number = errno.ENOSPC if number == errno.EIO and free.f_bavail * free.f_frsize < 1 << 20 else number
        plain = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = plain if number in (None, errno.EIO) else os.strerror(number)
        raise WriteError(number, f"cannot be written ({reason}); {kept}", str(path)) from error


def check_writable(folder: Path, key: str) -> None:
    """Raise a ValueError that names `key` if the folder cannot be created or written to. Creates nothing."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise ValueError(f"{key}: {folder} cannot be a folder: {there} is not one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {there} may not be written to")


def real_folder(path: Path, key: str) -> Path:
    """The folder at `path`, with a symbolic link resolved. ValueError that names `key` for a broken link."""
    if not path.is_symlink():
        return path
    if not path.is_dir():
        raise ValueError(f"{key}: {path} is a symbolic link to {os.readlink(path)}, which is no folder")
    return path.resolve()


@contextmanager
def only_process(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock the folder, so that no other flowmap process writes to it. The lock ends with the process, however it exits.

    If another process has the lock, raise a ValueError. With `waiting`, wait instead: waiting() is called at once and
    then once a minute.
    """
    made = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    handle = _locked(folder, waiting)
    try:
        yield
    finally:
        for path in made:  # remove the folders that only the lock needed: rmdir fails on the others
            with suppress(OSError):
                path.rmdir()
        os.close(handle)


def _locked(folder: Path, waiting: Callable[[], None] | None) -> int:
    """An open, locked descriptor of the folder. The folder itself is locked, so there is no lock file to clean up."""
    last = -math.inf
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
            os.close(handle)  # another process has removed the locked folder: try again
        except BlockingIOError as error:
            os.close(handle)
            if waiting is None:
                raise ValueError(
                    f"{folder}: another flowmap process is filling this folder; wait for it or choose another"
                ) from error
            if time.monotonic() - last >= MINUTE:
                last = time.monotonic()
                waiting()
            time.sleep(POLL)


def copy_folder(source: Path, target: Path, wanted: Callable[[Path], bool] = Path.is_file) -> None:
    """Copy the `wanted` files of a folder atomically; skip files that the target has already in the same size."""
    for path in sorted(p for p in source.rglob("*") if p.is_file() and wanted(p)):
        there = target / path.relative_to(source)
        if not there.is_file() or there.stat().st_size != path.stat().st_size:
            write_beside(there, functools.partial(shutil.copyfile, path))


def write_text(path: Path, text: str) -> None:
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> None:
    """Write a safetensors file. The same tensors give the same bytes.

    With `finite`, a tensor with a NaN or an infinite value raises a ValueError, and the file keeps its content.
    """
    from safetensors.torch import save_file

    if finite:
        check_finite(tensors, path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one metadata entry only: safetensors writes several in arbitrary order
    write_beside(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite. Anything else raises a one-line ValueError that names the file.

    Nothing is unpickled.
    """
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
            what = "is a pickle, not safetensors; flowmap loads no pickles, so convert it with the tool that wrote it"
        else:
            what = f"is not a whole safetensors file: {str(error).splitlines()[0]}"
        raise ValueError(f"{path}: {what}") from error
    check_finite(tensors, path)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. ValueError that names the file if it is not one."""
    text = bounded_text(path, "json")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value


def file_digest(path: str | Path) -> str:
    """The SHA-256 of the file in hexadecimal, computed in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str, errors: str = "strict") -> str:
    """The first 16 hexadecimal digits of the text's SHA-256. `errors` is passed to str.encode."""
    return hashlib.sha256(text.encode("utf-8", errors)).hexdigest()[:16]


def weights_hash(where: Path | None) -> str | None:
    """A hash of a weights file, or of all safetensors files in a folder; None if there are none.

    Reading takes about a second per gigabyte; results are cached by path, size and modification time.
    """
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
