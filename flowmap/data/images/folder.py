"""Pictures of the user's: a folder of image files, its subfolders the classes."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowmap.base.files import text_digest
from flowmap.base.images import from_bytes
from flowmap.base.ranges import CountFromZero, Seed, Side
from flowmap.data.dataset import Dataset, Source, held_out_count
from flowmap.data.images.captions import FolderCaptions, read_captions
from flowmap.data.images.listing import Listing, Tally, listing
from flowmap.data.images.survey import without_pictures
from flowmap.data.safe_files import printable
from flowmap.data.sources import MAX_PIXELS, Item, SquareImages, check_channels


@dataclass(frozen=True)
class FolderImages(SquareImages):
    """Every picture below `root`, in the order of paths. With several subfolders each is a class, unless `classes` is
    false.

    Classes are in the order of their names, or of their numbers where all are numbers; one without a usable picture
    keeps its number. Captions are read from metadata.jsonl or metadata.csv (file_name, text) of any folder, or from a
    .txt next to the picture. Hidden files and folders are skipped, links to folders are followed. The folder is listed
    once in the life of this object.
    """

    root: str = "???"
    classes: bool = True
    captions: bool = True
    kind: ClassVar[str] = "folder"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        label_of = {name: i for i, name in enumerate(self._classes)}
        captions: Callable[[str], str | None] = self._captions if self.captions else lambda name: None
        for name in self._listing.pictures[start:stop]:
            top, nested, _ = name.partition("/")
            if label_of and not nested:
                yield Item(None, None, None, name, "lies beside the class folders, not in one")
                continue
            label = label_of.get(top)
            try:
                caption = captions(name)
            except ValueError as error:
                yield Item(None, label, None, name, str(error))
                continue
            yield self._item(os.path.join(self.root, name), label, caption, name, MAX_PIXELS)

    def length(self) -> int:
        return len(self._listing.pictures)

    def num_classes(self) -> int | None:
        return len(self._classes) or None

    def class_names(self) -> list[str] | None:
        names = [printable(unicodedata.normalize("NFC", name)) for name in self._classes]
        return (names if len(set(names)) == len(names) else [*map(printable, self._classes)]) or None

    def fingerprint(self) -> str:
        contents = [self._listing.pictures, self._classes, self._captions.digest() if self.captions else None]
        return text_digest(json.dumps(contents))

    def skipped(self) -> dict[str, dict[str, Any]]:
        return self._listing.skipped | (self._captions.skipped if self.captions else {})

    def num_captions(self) -> int:
        return sum(name in self._captions for name in self._listing.pictures) if self.captions else 0

    @property
    def captions_hint(self) -> str:  # type: ignore[override]  # a constant of the other sources
        if not self.captions:
            return "data.images.captions is false"
        keys = [*map(printable, self._captions.keys)][:10]
        seen = f"; the metadata has the keys {', '.join(keys)}" if keys else ""
        files = "metadata.jsonl or metadata.csv (file_name, text) or a .txt next to each picture"
        return f"captions are read from {files}{seen}"

    @cached_property
    def _listing(self) -> Listing:
        return listing(self.root)

    @property
    def _classes(self) -> list[str]:
        return self._listing.classes if self.classes else []

    @cached_property
    def _captions(self) -> FolderCaptions:
        return read_captions(self.root, self._listing)


@dataclass(frozen=True)
class Folder(Source):
    """Every picture below `root`, upright, cropped to the largest centred square, scaled to size x size in [-1, 1], in
    memory.

    With several subfolders each is a class, in the order of their names (of their numbers where all are numbers).
    channels 3 is RGB, 1 grey levels; transparency becomes white. Files that cannot be read, or have more than 64
    million pixels, are left out; they, hidden files, unsupported files and grey pictures among coloured ones are
    counted on stderr. held_out images (null: a tenth, at most 1,000), drawn by `seed`, are never trained on.
    """

    root: str = "???"
    size: Side = 64
    channels: Side = 3
    held_out: CountFromZero | None = None
    seed: Seed = 0
    quick: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_channels(self.channels)

    def outline(self) -> tuple[tuple[int, ...], int | None]:
        return (self.channels, self.size, self.size), None  # how many classes there are, only the folder says

    def build(self) -> Dataset:
        source = FolderImages(self.size, self.channels, self.root, captions=False)
        images, labels, left_out, grey = [], [], [], 0
        for item in source.items():
            if item.image is None:
                left_out.append((item.key, item.problem))
                continue
            grey += item.grey
            images.append(from_bytes(item.image))
            labels.append(item.label)
        _log_line(source, labels, left_out, grey)
        if held_out_count(self.held_out, len(images)) >= len(images):
            raise ValueError(
                f"data.root: {self.root}: holds {len(images)} readable images, data.held_out: {self.held_out}"
            )
        names = source.class_names()
        name, pictures = Path(self.root).name, torch.stack(images)
        return (
            self._dataset(name, pictures, torch.tensor(labels), tuple(names))
            if names
            else self._dataset(name, pictures, None, None)
        )

    def _dataset(self, name: str, images: Tensor, labels: Tensor | None, names: tuple[str, ...] | None) -> Dataset:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        held_out = held_out_count(self.held_out, len(images))
        out, kept = order[:held_out], order[held_out:].sort().values
        if names is None or labels is None:
            return Dataset(name, images[kept], images[out])
        return Dataset(
            name, images[kept], images[out], labels[kept], labels[out], num_classes=len(names), class_names=names
        )


def _log_line(
    source: FolderImages, labels: list[int | None], left_out: list[tuple[str, str | None]], grey: int
) -> None:
    """On stderr, what of the folder is not in the data set."""
    if left_out:
        shown_ones = "; ".join(f"{name} {why}" for name, why in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        _line(source, f"{len(labels)} images, {len(left_out)} left out: {shown_ones}{more}")
    for line in Tally(source.skipped()).lines():
        _line(source, f"skipped: {line}")
    for line in without_pictures(
        source.class_names(), source.num_classes(), (label for label in labels if label is not None)
    ):
        _line(source, line)
    if grey:
        _line(source, f"{grey} of {len(labels)} images have grey levels alone")


def _line(source: FolderImages, text: str) -> None:
    print(f"{source.root}: {text}", file=sys.stderr)
