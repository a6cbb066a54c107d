"""Pictures in WebDataset shards: plain .tar files with the files of a sample together, named alike up to the first dot.

The shards are read as data, by position: nothing is extracted, no command runs, and no name in an entry is followed.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, ClassVar, NamedTuple

from flowmap.base.files import text_digest
from flowmap.data.images.listing import Tally
from flowmap.data.safe_files import MAX_TEXT_BYTES, decode_utf8, open_regular
from flowmap.data.sources import MAX_FILE_BYTES, SUFFIXES, Item, SquareImages, as_label, escapes, text_of

TEXTS = ("cls", "txt", "json")
BLOCK = tarfile.BLOCKSIZE
Members = list[tuple[str, tarfile.TarInfo]]


@dataclass(frozen=True, kw_only=True)
class WebDatasetImages(SquareImages):
    """The pictures (jpg, png, webp) of local .tar shards, each a path or a pattern with *; class in .cls, caption in
    .txt or .json.

    A .json is {"caption": "..."} or {"text": "..."}. Several tars joined into one file are read one after the other.
    Each shard's headers are read once to count its samples.
    """

    shards: tuple[str, ...]
    kind: ClassVar[str] = "webdataset"
    captions_hint: ClassVar[str] = "captions are read from the .txt or .json of each sample"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        first = 0
        for path, offsets in zip(self._paths, self._offsets, strict=True):
            low, high = max(start - first, 0), min(len(offsets), len(offsets) if stop is None else stop - first)
            if low < high:
                yield from self._read(path, offsets[low], high - low)
            first += len(offsets)

    def length(self) -> int:
        return sum(map(len, self._offsets))

    def num_captions(self) -> int:
        return sum(shard.texts for shard in self._headers)

    def skipped(self) -> dict[str, dict[str, Any]]:
        found = Tally()
        for shard in self._headers:
            for name in shard.spare:
                found.note("further pictures of a sample", name)
        return dict(found)

    def fingerprint(self) -> str:
        contents = "\n".join(f"{os.path.basename(path)} {os.path.getsize(path)}" for path in self._paths)
        return text_digest(contents, "surrogateescape")

    @cached_property
    def _paths(self) -> list[str]:
        found = []
        for shard in self.shards:
            paths = sorted(glob.glob(shard)) if "*" in shard else [shard]
            if not paths or not all(map(os.path.isfile, paths)):
                raise ValueError(f"data.images.shards: {shard}: there is no such file")
            found += paths
        return found

    @property
    def _offsets(self) -> list[array]:
        return [shard.offsets for shard in self._headers]

    @cached_property
    def _headers(self) -> list[_Headers]:
        return [_look(path) for path in self._paths]

    def _read(self, path: str, offset: int, count: int) -> Iterator[Item]:
        with open_regular(path) as file:
            for done, (tar, key, members) in enumerate(_samples(file, offset), 1):
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


class _Headers(NamedTuple):
    """Of one shard: the first byte of each sample, the number of texts, and further pictures of a sample, which are not
    read.
    """

    offsets: array
    texts: int
    spare: list[str]


def _look(path: str) -> _Headers:
    offsets, texts, spare = array("Q"), 0, []
    try:
        with open_regular(path) as file:
            for _, _, members in _samples(file):
                offsets.append(members[0][1].offset)
                texts += any(suffix in ("txt", "json") for suffix, _ in members)
                there = {suffix: member.name for suffix, member in members if f".{suffix}" in SUFFIXES}
                spare += [there[suffix] for suffix in sorted(there, key=lambda s: SUFFIXES.index(f".{s}"))[1:]]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"data.images.shards: {path}: is not a whole plain .tar: {error}") from error
    return _Headers(offsets, texts, spare)


def _samples(file: BinaryIO, start: int | None = 0) -> Iterator[tuple[tarfile.TarFile, str, Members]]:
    """(tar, key, [(suffix, member)]) of each sample from that byte on, through all joined tars. ValueError for a torn
    tar.
    """
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _together(tar):
                yield tar, key, members
            start = _next_tar(file, tar.offset)


def _together(tar: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """Groups consecutive files of a sample. Folders and files without a suffix belong to none."""
    last, members = "", Members()
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # otherwise TarFile remembers every member
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


def _next_tar(file: BinaryIO, end: int) -> int | None:
    """The start of the next joined tar after one with files up to that byte, None at the end of the file.

    tarfile itself stops there silently. Raises ValueError unless the tar ends as it must, with a block of zeros.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError("it is torn: the mark at the end of a .tar is missing")
    if any(block):
        raise ValueError(f"it is damaged: byte {end} begins no file and ends no .tar")
    while (block := file.read(BLOCK)) and not any(block):
        pass
    return file.tell() - len(block) if block else None


def _parts(members: list[tuple[str, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """The members of a sample by suffix. Raises ValueError for one that is no regular file, escapes the archive or is
    repeated.
    """
    parts: dict[str, tarfile.TarInfo] = {}
    for suffix, member in members:
        if f".{suffix}" not in SUFFIXES and suffix not in TEXTS:
            continue
        if escapes(member.name):
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
        file = tar.extractfile(member)
        assert file is not None  # a regular file
        return file.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _label_of(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> int | None:
    if "cls" not in parts:
        return None
    text = _content(tar, parts["cls"], MAX_TEXT_BYTES).strip()[:40]
    return as_label(int(text) if text.isdigit() else text.decode("utf-8", "replace"))


def _caption_of(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> str | None:
    if "txt" in parts:
        try:
            return decode_utf8(_content(tar, parts["txt"], MAX_TEXT_BYTES)).strip()
        except ValueError as error:
            raise ValueError(f"its caption cannot be read: it {error}") from error
    if "json" not in parts:
        return None
    try:
        row = json.loads(_content(tar, parts["json"], MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read: {error}") from error
    return text_of(row, ("caption", "text", "prompt")) if isinstance(row, dict) else None
