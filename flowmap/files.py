"""Files are written beside and renamed: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), flushes it to disk and renames it to `path`; on any failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of those tensors."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_beside(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError, in one line that names the file, for anything else. Nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    with open(path, "rb") as handle:
        start = handle.read(2)
    if start[:1] == b"\x80" or start == b"PK":
        raise ValueError(f"{path}: is a pickle, not safetensors; flowmap unpickles nothing, so convert it with the tool that wrote it")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file (torn or not one): {str(error).splitlines()[0]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in that file; ValueError names the file otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value
