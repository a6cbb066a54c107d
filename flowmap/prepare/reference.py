"""Reference statistics of all training pictures: mean and covariance of their features, computed part by part.

A part is a fixed range of the source's positions, so that any process may make it, any number of times; after an
interruption, a second call completes the folder. Sums are in float64. The parts are removed once statistics.npz exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmap.base.files import read_tensors, write_tensors
from flowmap.base.images import from_bytes
from flowmap.base.progress import LogFunction, Progress
from flowmap.build.data import build_data
from flowmap.data import Dataset
from flowmap.data.shards import shard_name
from flowmap.data.sources import ImageSource, Item
from flowmap.metrics.features import build_features, short_name
from flowmap.metrics.statistics import Moments, Statistics, read_statistics
from flowmap.plan.plan import resolve
from flowmap.plan.references import ReferenceStatistics
from flowmap.prepare.read_ahead import read_ahead
from flowmap.prepare.write import check_plan, making, once, whole, write_shard

PARTS = 64  # at most; each takes up to 17 MB on disk for Inception's features
MIN_ITEMS, STREAM_ITEMS = 1000, 20_000  # positions in a part: at least, and for a source of unknown length
SUFFIX = ".safetensors"

Batch = tuple[Tensor, int, list[str]]  # pictures in [-1, 1], positions read, and what was left out


class Pictures(Protocol):
    """All pictures that the statistics are of, by position."""

    def length(self) -> int | None: ...

    def fingerprint(self) -> str | None: ...

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]: ...


def make_reference(
    stage: ReferenceStatistics,
    *,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    log: LogFunction | None = None,
    waiting: Callable[[], None] | None = None,
) -> Statistics | None:
    """Make the stage's statistics.npz and return its contents, or None while other processes still make parts.

    shard (r, n): make the parts whose number is r modulo n. waiting: as in only_process (base/files.py). Raises
    ValueError if the folder is of other pictures, or if these have changed since it was begun.
    """
    if batch_size < 1:
        raise ValueError(f"batch: {batch_size} must be 1 or more")
    with making(stage.folder, shard, waiting):
        features = build_features(stage.features, torch.empty(0), device, weights=stage.weights)
        pictures = pictures_of(stage)
        items = _items(pictures.length())
        plan = {"identity": stage.identity(), "items": items, "length": pictures.length()}
        check_plan(stage.folder, plan | {"fingerprint": pictures.fingerprint()}, "reference", ("length", "fingerprint"))
        if not stage.complete:
            _Filling(stage, pictures, items, features, torch.device(device), batch_size, log).fill(*shard)
    if stage.complete:
        return read_statistics(stage.file)
    parts = _all_parts(stage.folder, pictures.length(), items)
    return None if parts is None else once(stage.folder, lambda: _finish(stage, parts, log or (lambda message: None)))


class _Filling:
    """Makes the parts of one process."""

    def __init__(
        self,
        stage: ReferenceStatistics,
        pictures: Pictures,
        items: int,
        features: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int,
        log: LogFunction | None,
    ):
        self.folder, self.pictures, self.items = stage.folder, pictures, items
        self.features, self.device, self.batch_size, self.log = features, device, batch_size, log

    def fill(self, rank: int, world: int) -> None:
        length = self.pictures.length()
        numbers = count(rank, world) if length is None else range(rank, math.ceil(length / self.items), world)
        mine = 0 if length is None else sum(min(self.items, length - number * self.items) for number in numbers)
        with Progress(mine, "reference", self.log, unit="image") as counted:
            for number in numbers:
                made = whole(self.folder, number, SUFFIX)
                if made is None:
                    made = self._make(number, counted)
                else:
                    counted(made["positions"])
                if made["positions"] < self.items:  # The source ends here.
                    return

    @torch.no_grad()
    def _make(self, number: int, counted: Callable[[int], None]) -> dict[str, Any]:
        moments, positions, left_out = None, 0, list[str]()
        start = number * self.items
        for pictures, read, unusable in self.pictures.batches(start, start + self.items, self.batch_size):
            positions += read
            left_out += unusable
            if len(pictures):
                found = self.features(pictures.to(self.device))
                moments = moments or Moments(found.shape[1], self.device)
                moments.add(found)
            counted(read)
        summary = {"positions": positions, "pictures": moments.count if moments else 0, "left_out": left_out}
        tensors = _packed(moments) if moments else {"sum": torch.zeros(0, dtype=torch.float64)}
        return write_shard(self.folder, number, lambda path: write_tensors(path, tensors), summary, SUFFIX)


def _items(length: int | None) -> int:
    return STREAM_ITEMS if length is None else max(MIN_ITEMS, math.ceil(length / PARTS))


def _all_parts(folder: Path, length: int | None, items: int) -> list[dict[str, Any]] | None:
    """The summaries of all parts, in order; None if one is missing."""
    parts: list[dict[str, Any]] = []
    while length is None or len(parts) * items < length:
        summary = whole(folder, len(parts), SUFFIX)
        if summary is None:
            return None
        parts.append(summary)
        if length is None and summary["positions"] < items:
            break
    return parts


def _finish(stage: ReferenceStatistics, parts: list[dict[str, Any]], log: LogFunction) -> Statistics:
    """Add the parts up in their order, write statistics.npz and remove them."""
    total: Moments | None = None
    for number, part in enumerate(parts):
        if part["pictures"]:
            moments = _unpacked(read_tensors(stage.folder / shard_name(number, SUFFIX)), part["pictures"])
            total = moments if total is None else total.plus(moments)
    left_out = [one for part in parts for one in part["left_out"]]
    if left_out:
        log(f"{len(left_out)} pictures left out: {'; '.join(left_out[:3])}{'; ...' if len(left_out) > 3 else ''}")
    identity = json.dumps(stage.identity())
    if total is None:
        raise ValueError(f"{stage.folder}: none of the pictures can be used")
    found = total.statistics(features=short_name(stage.features), identity=identity)
    found.write(stage.file)
    for number in range(len(parts)):
        for suffix in (SUFFIX, ".json"):
            (stage.folder / shard_name(number, suffix)).unlink(missing_ok=True)
    return found


def _packed(moments: Moments) -> dict[str, Tensor]:
    """The sums without the lower triangle, which repeats the upper one."""
    rows, columns = torch.triu_indices(len(moments.sum), len(moments.sum), device=moments.sum.device)
    return {"sum": moments.sum, "upper": moments.outer[rows, columns]}


def _unpacked(tensors: dict[str, Tensor], pictures: int) -> Moments:
    width = len(tensors["sum"])
    found = Moments(width)
    found.count, found.sum = pictures, tensors["sum"]
    rows, columns = torch.triu_indices(width, width)
    found.outer[rows, columns] = tensors["upper"]
    found.outer[columns, rows] = tensors["upper"]
    return found


def pictures_of(stage: ReferenceStatistics) -> Pictures:
    """The pictures of data.images, or the training samples of data in pixels."""
    source = stage.recipe.data.images
    return InSource(source) if source is not None else InMemory(build_data(resolve(stage.recipe)))


class InSource:
    """The pictures of an image source, decoded ahead of the batch that is used."""

    def __init__(self, source: ImageSource):
        self.source = source

    def length(self) -> int | None:
        return self.source.length()

    def fingerprint(self) -> str | None:
        return self.source.fingerprint()

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        length = self.length()
        yield from map(self._batch, read_ahead(self.source, start, stop if length is None else min(stop, length), size))

    def _batch(self, items: list[Item]) -> Batch:
        images = [item.image for item in items if item.image is not None]
        shape = (self.source.channels, self.source.size, self.source.size)
        pictures = torch.stack(images) if images else torch.zeros(0, *shape, dtype=torch.uint8)
        left_out = [f"{item.key} {item.problem}" for item in items if item.image is None]
        return from_bytes(pictures), len(items), left_out


class InMemory:
    """The training samples of a data set."""

    def __init__(self, data: Dataset):
        self.data = data

    def length(self) -> int:
        return len(self.data)

    def fingerprint(self) -> None:
        return None

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        stop = min(stop, len(self.data))
        for i in range(start, stop, size):
            pictures, _ = self.data.__getitems__(range(i, min(i + size, stop)))
            yield pictures, len(pictures), []
