"""Pictures in WebDataset shards: plain .tar files in which the files of one sample stand together and share the name before the first dot.

The shards are read as data, by position: nothing is extracted, no command is run, and no name that an entry carries is followed.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from flowmap.data.sources import MAX_FILE_BYTES, MAX_TEXT_BYTES, SUFFIXES, Item, SquareImages, as_label, leaves

TEXTS = ("cls", "txt", "json")


@dataclass(frozen=True, kw_only=True)
class WebDatasetImages(SquareImages):
    """The pictures (jpg, png, webp) of local .tar shards, each a path or a pattern with *; class in .cls, caption in .txt or .json.

    A .json is {"caption": "..."} or {"text": "..."}. Each shard's headers are read once to count its samples.
    """

    shards: tuple[str, ...]
    kind: ClassVar[str] = "webdataset"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        first = 0
        for path, offsets in zip(self._paths, self._offsets, strict=True):
            low, high = max(start - first, 0), min(len(offsets), len(offsets) if stop is None else stop - first)
            if low < high:
                yield from self._read(path, offsets[low], high - low)
            first += len(offsets)

    def length(self) -> int:
        return sum(map(len, self._offsets))

    def fingerprint(self) -> str:
        told = "\n".join(f"{os.path.basename(path)} {os.path.getsize(path)}" for path in self._paths)
        return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @cached_property
    def _paths(self) -> list[str]:
        found = []
        for shard in self.shards:
            paths = sorted(glob.glob(shard)) if "*" in shard else [shard]
            if not paths or not all(map(os.path.isfile, paths)):
                raise ValueError(f"data.images.shards: {shard}: there is no such file")
            found += paths
        return found

    @cached_property
    def _offsets(self) -> list[array]:
        """For each shard where its samples begin, in bytes."""
        return [_sample_offsets(path) for path in self._paths]

    def _read(self, path: str, offset: int, count: int) -> Iterator[Item]:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for done, (key, members) in enumerate(_samples(tar), 1):
                    yield self._sample(tar, f"{os.path.basename(path)}/{key}", members)
                    if done == count:
                        return

    def _sample(self, tar: tarfile.TarFile, key: str, members: list[tuple[str, tarfile.TarInfo]]) -> Item:
        label = caption = None
        try:
            parts = _parts(members)
            label, caption = _label_of(tar, parts), _caption_of(tar, parts)
            suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in parts), None)
            if suffix is None:
                raise ValueError(f"holds no picture ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
            content = _content(tar, parts[suffix[1:]], MAX_FILE_BYTES)
        except ValueError as error:
            return Item(None, label, caption, key, str(error))
        return self._item(io.BytesIO(content), label, caption, key)


def _sample_offsets(path: str) -> array:
    try:
        with tarfile.open(path, mode="r:") as tar:
            found = array("Q", (members[0][1].offset for _, members in _samples(tar)))
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"data.images.shards: {path}: is not a whole plain .tar: {error}") from error
    if end >= os.path.getsize(path):
        raise ValueError(f"data.images.shards: {path}: is torn: the mark at the end of a .tar is missing")
    return found


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """(key, [(suffix, member)]) of files that stand together; folders and files without a suffix belong to no sample."""
    last, members = None, []
    while (member := tar.next()) is not None:
        tar.members = []  # TarFile remembers every member otherwise
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if member.isdir() or not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if members and key != last:
            yield last, members
            members = []
        last = key
        members.append((suffix.lower(), member))
    if members:
        yield last, members


def _parts(members: list[tuple[str, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """The members that matter, by suffix; ValueError for one that is no plain file, leaves the archive or comes twice."""
    parts: dict[str, tarfile.TarInfo] = {}
    for suffix, member in members:
        if f".{suffix}" not in SUFFIXES and suffix not in TEXTS:
            continue
        if leaves(member.name):
            raise ValueError("has a name that points out of the archive")
        if not member.isreg():
            raise ValueError(f"its .{suffix} is a link or a device, not a file")
        if suffix in parts:
            raise ValueError(f"has .{suffix} twice")
        parts[suffix] = member
    return parts


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"{os.path.basename(member.name)} has {member.size} bytes; {limit} are allowed")
    try:
        return tar.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _label_of(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> int | None:
    if "cls" not in parts:
        return None
    text = _content(tar, parts["cls"], MAX_TEXT_BYTES).strip()[:40]
    return as_label(int(text) if text.isdigit() else text.decode("utf-8", "replace"))


def _caption_of(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> str | None:
    if "txt" in parts:
        return _content(tar, parts["txt"], MAX_TEXT_BYTES).decode("utf-8", "replace").strip()
    if "json" not in parts:
        return None
    try:
        row = json.loads(_content(tar, parts["json"], MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read: {error}") from error
    found = row.get("caption", row.get("text")) if isinstance(row, dict) else None
    return found if isinstance(found, str) else None
