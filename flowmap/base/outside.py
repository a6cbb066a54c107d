"""Reads untrusted text and YAML files: bounded in size, without interpolation. Error messages never quote them."""

from __future__ import annotations

import copy
import difflib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MOST_BYTES = {"yaml": 1 << 20, "json": 1 << 28}
INTERPOLATION = "${"
NO_INTERPOLATION = (
    f"holds {INTERPOLATION}...}}, which is not resolved here: nothing of the environment or of other settings is; "
    "write the value"
)


def bounded_text(path: Path, kind: str) -> str:
    """The text of a regular file of at most MOST_BYTES[kind].

    Raises a ValueError, which does not quote the content, for a pipe, a device, a larger file, or invalid UTF-8.
    """
    try:
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):
            raise ValueError(f"{path}: is not a regular file")
        if there.st_size > MOST_BYTES[kind]:
            raise ValueError(f"{path}: has {there.st_size} bytes; allowed: at most {MOST_BYTES[kind]}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def read_settings(path: Path, known: Iterable[str], what: str) -> dict[str, Any]:
    """The settings in a YAML file, as plain containers.

    Raises a ValueError, which does not quote the content, if the file is not YAML or has an interpolation, or if no
    key equals or resembles one of `known`: then the file is not a `what` at all.
    """
    plain, known = read_yaml(path), list(known)
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: is not a mapping of settings")
    near = (difflib.get_close_matches(str(key), known, n=1) for key in list(plain)[:20])
    if plain and not any(key in known for key in plain) and not any(near):
        raise ValueError(f"{path}: holds no setting of a {what}; allowed: {', '.join(known)}")
    return plain


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as plain containers.

    Raises a ValueError, which does not quote the content, if the file is not YAML or has an interpolation.
    """
    text = bounded_text(path, "yaml")
    try:
        plain = copy.deepcopy(_parsed(text))
    except OmegaConfBaseException as error:
        what = NO_INTERPOLATION if INTERPOLATION in text else f"cannot be read: {type(error).__name__}"
        raise ValueError(f"{path}: {f'{error.full_key}: ' if error.full_key else ''}{what}") from None
    except Exception as error:  # PyYAML's own errors: omegaconf re-exports no common class for them
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{path}: is not YAML{at}") from None
    refuse_interpolations(plain, f"{path}: ")
    return plain


@lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    """The content of YAML text, kept, as recipes share their parts. Do not change it."""
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)


def refuse_interpolations(plain: Any, prefix: str) -> None:
    """Raise a ValueError for the first text that contains `${`. It names the key, not the value."""
    key = next(_interpolated(plain, ""), None)
    if key is not None:
        raise ValueError(f"{prefix}{f'{key}: ' if key else ''}{NO_INTERPOLATION}")


def _interpolated(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, str) and INTERPOLATION in node:
        yield key
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        part = f"[{name}]" if isinstance(node, list) else str(name)
        yield from _interpolated(value, f"{key}.{part}" if key and isinstance(node, dict) else f"{key}{part}")
