"""The captions of a folder of pictures: metadata.jsonl or metadata.csv in any of its folders, or a .txt next to a
picture.

Columns are those of Hugging Face's image folders: file_name, relative to the folder of the metadata file, and text.
Other common names are read too.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowmap.base.files import text_digest
from flowmap.data.images.listing import Listing, Tally, normalized_name
from flowmap.data.safe_files import lines_of, printable, read_text
from flowmap.data.sources import TEXT_KEYS, text_of

FILE_KEYS = ("file_name", "filename", "file", "image", "path")


@dataclass
class FolderCaptions:
    """Captions of the pictures in a folder at `root`; metadata takes precedence over a .txt.

    skipped: captions without a picture, duplicates, metadata lines without a caption. keys: the keys of those lines.
    """

    root: str
    metadata: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    skipped: Tally = field(default_factory=Tally)
    keys: dict[str, None] = field(default_factory=dict)

    def __call__(self, name: str) -> str | None:
        """The caption of that picture, None where it has none; ValueError where its .txt cannot be read."""
        if (found := self.metadata.get(normalized_name(name))) is not None:
            return found
        caption_file = self.texts.get(_stem(name))
        if caption_file is None:
            return None
        try:
            return read_text(os.path.join(self.root, caption_file)).strip()
        except OSError as error:
            raise ValueError(f"its caption cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"its caption cannot be read: it {error}") from error

    def __contains__(self, name: str) -> bool:
        """Whether that picture has a caption. A .txt counts, whatever its contents."""
        return normalized_name(name) in self.metadata or _stem(name) in self.texts

    def digest(self) -> str:
        """A hash of all captions in metadata, and of the names of the texts next to pictures."""
        contents = json.dumps([self.metadata, self.texts], sort_keys=True)
        return text_digest(contents)


def read_captions(root: str, listing: Listing) -> FolderCaptions:
    """The captions of the pictures in that listing of `root`. ValueError names file and line of unreadable metadata."""
    captions, pictures = FolderCaptions(root), {normalized_name(name) for name in listing.pictures}
    for path in listing.metadata:
        for number, row in _rows(root, path):
            _add(captions, pictures, path, number, row)
    stems = {_stem(name) for name in listing.pictures}
    for stem, path in listing.texts.items():
        if stem in stems:
            captions.texts[stem] = path
        else:
            captions.skipped.note("text files without a picture", path)
    return captions


def _add(captions: FolderCaptions, pictures: set[str], path: str, number: int, row: Mapping[str, Any]) -> None:
    name, text = _named(row, f"{os.path.join(captions.root, path)}: line {number}"), text_of(row)
    place = normalized_name(os.path.join(os.path.dirname(path), name))
    if text is None:
        captions.skipped.note("metadata lines without a caption", f"{path}:{number}")
        captions.keys |= dict.fromkeys(map(str, row))
    elif place not in pictures:
        captions.skipped.note("captions without a picture", place)
    else:
        if captions.metadata.get(place, text) != text:
            captions.skipped.note("duplicate captions (the last one is used)", place)
        captions.metadata[place] = text


def _stem(name: str) -> str:
    return normalized_name(os.path.splitext(name)[0])


def _rows(root: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row) of a file of metadata."""
    path = os.path.join(root, name)
    return _rows_of_csv(path) if name.lower().endswith(".csv") else _rows_of_lines(path)


def _rows_of_lines(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise ValueError(f'{path}: line {number} is not {{"file_name": ..., "text": ...}}')
        yield number, row


def _rows_of_csv(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader((f"{line}\n" for line in lines_of(path)), strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num} is not CSV: {error}") from error


def _named(row: Mapping[str, Any], where: str) -> str:
    found = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), None)
    if found is None:
        allowed = f"one of {', '.join(FILE_KEYS)}, and a text in one of {', '.join(TEXT_KEYS)}"
        has = ", ".join(printable(str(key)) for key in [*row][:10]) or "nothing"
        raise ValueError(
            f"{where} names no picture; allowed: {allowed}; it has {has}; captions: false ignores metadata"
        )
    return found
