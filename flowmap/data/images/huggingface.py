"""Pictures of a Hugging Face data set: on disk, in the hub's cache, or streamed from the hub. Code of a data set never
runs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from flowmap.data.sources import Item, SquareImages, as_label, class_names_of, optional


@dataclass(frozen=True)
class HuggingFaceImages(SquareImages):
    """The pictures in column `image` of a data set: a hub id, a folder of save_to_disk, or one that load_dataset reads.

    label: a column of classes (ClassLabel, or whole numbers from 0). caption: a column of texts, of several in a cell
    the first. Without them neither is read. streaming: read from the hub in its order; the length is not known before
    the end.
    """

    path: str = "???"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    image: str = "image"
    label: str | None = None
    caption: str | None = None
    kind: ClassVar[str] = "huggingface"
    captions_hint: ClassVar[str] = "data.images.caption names the column"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        if self.streaming:
            rows = self._stream.rows(start, stop)
        else:
            end = len(self._rows) if stop is None else min(stop, len(self._rows))
            rows = (self._rows[i] for i in range(start, end))
        for place, row in enumerate(rows, start):
            yield self._read(row, f"{self.split}[{place}]")

    def length(self) -> int | None:
        return None if self.streaming else len(self._rows)

    def num_classes(self) -> int | None:
        names = self.class_names()
        return len(names) if names else None

    def class_names(self) -> list[str] | None:
        return class_names_of((self._rows.features or {}).get(self.label))

    def fingerprint(self) -> str | None:
        return None if self.streaming else str(self._rows._fingerprint)

    def num_captions(self) -> int | None:
        return 0 if self.caption is None else None

    @cached_property
    def _rows(self) -> Any:
        """The data set with its pictures as they are stored, not decoded."""
        datasets = optional("datasets")
        try:
            rows = self._load(datasets)
            for key, column in (("image", self.image), ("label", self.label), ("caption", self.caption)):
                if column is not None and rows.features is not None and column not in rows.features:
                    raise ValueError(f"{key}: {column!r} is no column; allowed: {', '.join(rows.features)}")
            return rows.cast_column(self.image, datasets.Image(decode=False))
        except Exception as error:  # builders, file systems and the hub each have errors of their own
            said = " ".join(str(error).split())[:300]
            raise ValueError(
                f"data.images.path: {self.path!r} with split {self.split!r} cannot be used: {said}"
            ) from error

    def _load(self, datasets: Any) -> Any:
        folder = Path(self.path)
        if (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(self.path)
            if self.split not in saved:
                raise ValueError(f"split: {self.split!r} is not one of {', '.join(saved)}")
            rows = saved[self.split]
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(self.path)
        else:
            options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
            return datasets.load_dataset(self.path, self.name, **options)
        return rows.to_iterable_dataset() if self.streaming else rows

    @cached_property
    def _stream(self) -> _Stream:
        return _Stream(self._rows)

    def _read(self, row: Mapping[str, Any], key: str) -> Item:
        caption = row[self.caption] if self.caption else None
        if isinstance(caption, (list, tuple)):
            caption = caption[0] if caption else None
        if caption is not None and not isinstance(caption, str):
            return Item(None, None, None, key, f"its caption is {str(caption)[:40]!r}, not a text")
        try:
            label = as_label(
                row[self.label] if self.label and row[self.label] != -1 else None
            )  # -1: the ClassLabel of no class
            file = _file_of(row[self.image])
        except ValueError as error:
            return Item(None, None, caption, key, str(error))
        return self._item(file, label, caption, key)


class _Stream:
    """The rows of a stream from any position on. Forward it continues without decoding skipped rows; backward it
    restarts.
    """

    def __init__(self, dataset: Any):
        self.dataset, self.iterator, self.place = dataset, iter(dataset), 0

    def rows(self, start: int, stop: int | None) -> Iterator[Any]:
        if start < self.place:
            self.iterator, self.place = iter(self.dataset), 0
        for _ in islice(self.iterator, start - self.place):
            self.place += 1
        while stop is None or self.place < stop:
            row = next(self.iterator, None)
            if row is None:
                return
            self.place += 1
            yield row


def _file_of(cell: Any) -> Any:
    """A file for PIL from a cell {"bytes", "path"}. A path must be a local file; no address is fetched."""
    if isinstance(cell, Mapping) and cell.get("bytes") is not None:
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, Mapping) and cell.get("path") and os.path.isfile(cell["path"]):
        return cell["path"]
    raise ValueError("holds no picture (neither bytes nor a file on this machine)")
