"""Pictures of the user's: a folder of image files, its subfolders the classes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowmap.data.dataset import Dataset, Source, held_out_count
from flowmap.data.sources import MAX_PIXELS, SUFFIXES, Item, SquareImages


@dataclass(frozen=True)
class FolderImages(SquareImages):
    """Every image below `root`, in the order of their paths; with subfolders each of them is a class, unless `classes` is false.

    Captions, where wanted, stand in root/metadata.jsonl, a line {"file_name": "cats/a.png", "text": "..."} each, or in a .txt beside the picture.
    The folder is listed once in the life of this object.
    """

    root: str = "???"
    classes: bool = True
    captions: bool = True
    kind: ClassVar[str] = "folder"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        place, captions = {name: i for i, name in enumerate(self._names)}, self._metadata if self.captions else {}
        for name in self._files[start:stop]:
            first, nested = name.split("/", 1)[0], "/" in name
            if place and not nested:
                yield Item(None, None, None, name, "lies beside the class folders, not in one")
                continue
            label = place[first] if len(place) > 1 else None
            try:
                caption = captions[name] if name in captions else self._beside(name)
            except ValueError as error:
                yield Item(None, label, None, name, str(error))
                continue
            yield self._item(os.path.join(self.root, name), label, caption, name, MAX_PIXELS)

    def length(self) -> int:
        return len(self._files)

    def num_classes(self) -> int | None:
        return len(self._names) if len(self._names) > 1 else None

    def class_names(self) -> list[str] | None:
        return list(self._names) if len(self._names) > 1 else None

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._files).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @cached_property
    def _files(self) -> list[str]:
        """Paths from root, with /, sorted by their parts."""
        if not Path(self.root).is_dir():
            raise ValueError(f"data.root: {self.root}: there is no such folder")
        found = (name for name in _below(self.root, "") if os.path.splitext(name)[1].lower() in SUFFIXES)
        return sorted(found, key=lambda name: name.split("/"))

    @cached_property
    def _names(self) -> list[str]:
        return sorted({name.split("/", 1)[0] for name in self._files if "/" in name}) if self.classes else []

    @cached_property
    def _metadata(self) -> dict[str, str]:
        path = Path(self.root) / "metadata.jsonl"
        if not path.is_file():
            return {}
        found = {}
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else {"file_name": ""}
                    name, text = row["file_name"], row.get("text")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise ValueError(f"{path}: line {number} is not {{\"file_name\": ..., \"text\": ...}}") from error
                if isinstance(text, str):
                    found[name] = text
        return found

    def _beside(self, name: str) -> str | None:
        """The text of the .txt beside the picture, None where there is none."""
        if not self.captions:
            return None
        try:
            with open(os.path.join(self.root, os.path.splitext(name)[0] + ".txt"), encoding="utf-8") as text:
                return text.read().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"its caption cannot be read: {error}") from error


@dataclass(frozen=True)
class Folder(Source):
    """Every image below `root`, cut to the largest centred square and scaled to size x size pixels in [-1, 1]; all held in memory.

    With subfolders each of them is a class, in the order of their names. channels 3 is RGB, 1 grey levels; transparency lies on white.
    Files that cannot be read, or have more than 64 million pixels, are left out, counted and named on stderr; grey files among coloured
    ones are counted. held_out images (null: a tenth, at most 1,000), drawn by `seed`, are never trained on.
    """

    root: str = "???"
    size: int = 64
    channels: int = 3
    held_out: int | None = None
    seed: int = 0
    quick: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1 or self.channels not in (1, 3) or (self.held_out or 0) < 0:
            raise ValueError(f"size: {self.size}, channels: {self.channels} and held_out: {self.held_out}; allowed: from 1; 1 or 3; from 0")

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
            images.append(item.image.float() / 127.5 - 1)
            labels.append(item.label)
        root = Path(self.root)
        _say(root, len(images), left_out, grey)
        if held_out_count(self.held_out, len(images)) >= len(images):
            raise ValueError(f"data.root: {self.root}: holds {len(images)} readable images, data.held_out: {self.held_out}")
        num_classes = source.num_classes()
        return self._dataset(root.name, torch.stack(images), torch.tensor(labels) if num_classes else None, num_classes)

    def _dataset(self, name: str, images: Tensor, labels: Tensor | None, num_classes: int | None) -> Dataset:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        held_out = held_out_count(self.held_out, len(images))
        out, kept = order[:held_out], order[held_out:].sort().values
        if labels is None:
            return Dataset(name, images[kept], images[out])
        return Dataset(name, images[kept], images[out], labels[kept], labels[out], num_classes=num_classes)


def _below(root: str, inside: str) -> Iterator[str]:
    """The files below that folder; links to folders are not followed."""
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _below(root, f"{inside}{entry.name}/")
            elif entry.is_file():
                yield inside + entry.name


def _say(root: Path, count: int, left_out: list[tuple[str, str]], grey: int) -> None:
    if left_out:
        shown = "; ".join(f"{name} {why}" for name, why in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        print(f"{root}: {count} images, {len(left_out)} left out: {shown}{more}", file=sys.stderr)
    if grey:
        print(f"{root}: {grey} of {count} images have grey levels alone", file=sys.stderr)
