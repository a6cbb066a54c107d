"""EDM2's data sets: a zip of PNGs, or of mean and spread of the SD autoencoder's latents, with classes in dataset.json.

Format, from github.com/NVlabs/edm2 (dataset_tool.py, training/dataset.py, training/encoders.py): pictures
`00000/img00000000.png`; latents `00000/img-mean-std-00000000.npy` of shape (2 C, H, W), mean before spread;
dataset.json {"labels": [[name, class], ...] or null}. Samples are in the order of their names.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from flowmap.base.files import text_digest
from flowmap.base.ranges import Count, CountFromZero, Number, Positive, Seed
from flowmap.data.dataset import BaseDataset, Source, held_out_count
from flowmap.data.images.listing import Tally, is_hidden, normalized_name
from flowmap.data.safe_files import Positioned, open_regular
from flowmap.data.sources import MAX_FILE_BYTES, SUFFIXES, Item, SquareImages, as_label, escapes
from flowmap.data.stored import StoredSamples
from flowmap.flow.seeds import seeded
from flowmap.flow.types import Cond

MAX_LABELS_BYTES = 2**30


@dataclass(frozen=True)
class EDM2Images(SquareImages):
    """The pictures of an EDM2 zip `path`; a zip of latents is data kind edm2_zip."""

    path: str = "???"
    kind: ClassVar[str] = "edm2_zip"
    captions_hint: ClassVar[str] = "an EDM2 zip holds no captions"

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for name in self._zip.names[start:stop]:
            try:
                label, content = self._zip.labels.get(name), self._zip.read(name)
            except ValueError as error:
                yield Item(None, None, None, name, str(error))
                continue
            yield self._item(io.BytesIO(content), label, None, name)

    def length(self) -> int:
        return len(self._zip.names)

    def num_classes(self) -> int | None:
        return self._zip.num_classes

    def fingerprint(self) -> str:
        return self._zip.fingerprint()

    def skipped(self) -> dict[str, dict[str, Any]]:
        return dict(self._zip.skipped)

    def num_captions(self) -> int:
        return 0

    @cached_property
    def _zip(self) -> Archive:
        archive = Archive(self.path, SUFFIXES)
        if not archive.names:
            latents = any(name.endswith(".npy") for name in archive.infos)
            raise ValueError(
                f"path: {self.path}: holds no pictures"
                + ("; it holds latents, which are data {kind: edm2_zip}" if latents else "")
            )
        return archive


@dataclass(frozen=True)
class EDM2Latents(Source):
    """The latents of an EDM2 zip `path`: mean + spread * noise, normalised by fixed figures per channel to mean 0,
    spread 0.5.

    The noise is a function of (seed, position): a sample is the same in every epoch. The reference are the first
    `reference_images` samples. held_out samples (null: a tenth, at most 1,000), drawn by `seed`, are
    never trained on.
    """

    path: str = "???"
    held_out: CountFromZero | None = None
    reference_images: Count = 10_000
    seed: Seed = 0
    raw_mean: tuple[Number, ...] = (5.81, 3.25, 0.12, -2.15)
    raw_std: tuple[Positive, ...] = (4.17, 4.62, 3.71, 3.28)
    final_std: Positive = 0.5
    in_pixels: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if len(self.raw_mean) != len(self.raw_std):
            raise ValueError(f"raw_std: {self.raw_std} must be as many as raw_mean")

    def build(self) -> ZipLatents:
        return ZipLatents(self)


class ZipLatents(BaseDataset):
    """A data set (see data/dataset.py) that reads each sample from the zip on access."""

    reads_disk: ClassVar[bool] = True
    empty: dict[str, Tensor] = {}
    class_names: tuple[str, ...] | None = None  # dataset.json has numbers alone

    def __init__(self, spec: EDM2Latents):
        self.spec, self.name, self.archive = spec, Path(spec.path).stem, Archive(spec.path, (".npy",))
        names = self.archive.names
        if not names:
            raise ValueError(f"data.path: {spec.path}: holds no latents (.npy)")
        for line in self.archive.skipped.lines():
            print(f"{spec.path}: skipped: {line}", file=sys.stderr)
        self.shape = self._shape(names[0])
        bytes_of_one = self.archive.infos[names[0]].file_size
        self.names = [
            name for name in names if self.archive.infos[name].file_size == bytes_of_one and not escapes(name)
        ]
        if len(self.names) < len(names):
            first, count = min(set(names) - set(self.names)), f"{len(names) - len(self.names)} of {len(names)}"
            print(f"{spec.path}: {count} latents left out: {first!r} differs from the first", file=sys.stderr)
        unlabelled = sum(name not in self.archive.labels for name in self.names)
        if self.archive.labels and unlabelled:
            print(f"{spec.path}: {unlabelled} of {len(self.names)} latents have no class", file=sys.stderr)
        held_out = held_out_count(spec.held_out, len(self.names))
        if held_out >= len(self.names):
            raise ValueError(f"data.held_out: {held_out} leaves nothing of {len(self.names)} samples")
        order = torch.randperm(len(self.names), generator=torch.Generator().manual_seed(spec.seed))
        self._out, self._kept = order[:held_out], order[held_out:].sort().values
        self.num_classes = self.archive.num_classes

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) int64, -1 where a sample has no class; None where there are none."""
        if self.num_classes is None:
            return None
        return self._labels[self._kept]

    @cached_property
    def _labels(self) -> Tensor:
        return torch.tensor([-1 if (label := self.archive.labels.get(name)) is None else label for name in self.names])

    @cached_property
    def held_out(self) -> StoredSamples:
        return StoredSamples(len(self._out), self.shape, partial(self._draw_of, self._out))

    @cached_property
    def reference(self) -> StoredSamples:
        return StoredSamples(self.num_reference, self.shape, partial(self._draw_of, self._kept))

    @property
    def reference_labels(self) -> Tensor | None:
        """(N,) int64, row by row as in `reference`; None where there are none."""
        return None if self.labels is None else self.labels[: self.spec.reference_images]

    def reference_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those samples of the reference; {} where there are none."""
        return self._conditions(places)

    def held_out_samples(self, num: int | None = None) -> tuple[Tensor, Cond]:
        """(x0, cond) of the first `num` held-out samples (None: all), as training would see them.

        Row by row as in `held_out`.
        """
        labels = self.held_out_labels
        return self.held_out[:num], {} if labels is None else {"class": labels[:num]}

    @property
    def num_reference(self) -> int:
        return min(len(self._kept), self.spec.reference_images)

    @property
    def reference_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def num_held_out(self) -> int:
        return len(self._out)

    @property
    def held_out_labels(self) -> Tensor | None:
        return None if self.num_classes is None else self._labels[self._out]

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those held-out samples."""
        labels = self.held_out_labels
        return {} if labels is None else {"class": labels[places]}

    def __len__(self) -> int:
        return len(self._kept)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        rows = torch.as_tensor(list(indices))
        return self._draw(self._kept[rows]), self._conditions(rows)

    def conditions_at(self, places: Tensor) -> Cond:
        return self._conditions(places)

    def _conditions(self, rows: Tensor) -> dict[str, Tensor]:
        return {} if self.labels is None else {"class": self.labels[rows]}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._latent(name).shape
        if len(shape) != 3 or shape[0] != 2 * len(self.spec.raw_mean):
            raise ValueError(
                f"data.path: {self.spec.path}: {name!r} has shape {shape}, not ({2 * len(self.spec.raw_mean)}, H, W)"
            )
        return (shape[0] // 2, *shape[1:])

    def _latent(self, name: str) -> numpy.ndarray:
        try:
            return read_array(self.archive.read(name))
        except ValueError as error:
            raise ValueError(f"data.path: {self.spec.path}: {name!r} {error}") from error

    def _draw_of(self, order: Tensor, places: Tensor) -> Tensor:
        return self._draw(order[places])

    def _draw(self, places: Tensor) -> Tensor:
        """float32 (B, C, H, W): (mean + spread * noise - raw_mean) / raw_std * final_std."""
        if not len(places):
            return torch.zeros(0, *self.shape)
        found = [self._latent(self.names[place]) for place in places.tolist()]
        if any(array.shape != (2 * self.shape[0], *self.shape[1:]) for array in found):
            raise ValueError(f"data.path: {self.spec.path}: a latent is not of the shape of the first, {self.shape}")
        mean, std = torch.from_numpy(numpy.stack(found)).float().chunk(2, dim=1)
        noise = torch.stack([self._noise(place) for place in places.tolist()])
        raw_mean, raw_std = (torch.tensor(values).view(-1, 1, 1) for values in (self.spec.raw_mean, self.spec.raw_std))
        return (mean + std * noise - raw_mean) / raw_std * self.spec.final_std

    def _noise(self, place: int) -> Tensor:
        return torch.randn(self.shape, generator=seeded(f"{self.spec.seed}/{place}"))


class Archive:
    """A zip read as data: nothing is extracted, no name is followed, and an entry larger than expected is refused.

    names: those with one of the suffixes, in order, without hidden ones. labels: name -> class, from dataset.json, {}
    without labels. skipped: hidden entries, and labels without an entry. Raises ValueError where dataset.json has
    labels and none matches an entry.
    """

    def __init__(self, path: str, suffixes: tuple[str, ...]):
        try:
            self._file = zipfile.ZipFile(io.BufferedReader(Positioned(open_regular(path))))
        except FileNotFoundError:
            raise ValueError(f"path: {path}: there is no such file") from None
        except (
            zipfile.BadZipFile,
            OSError,
            NotImplementedError,
            ValueError,
        ) as error:  # ValueError: a name that is not what it says to be
            raise ValueError(f"path: {path}: is not a whole zip: {error}") from error
        self.path, self.suffixes, self.infos, self.skipped = (
            path,
            suffixes,
            {info.filename: info for info in self._file.infolist() if not info.is_dir()},
            Tally(),
        )
        found = sorted(name for name in self.infos if name.lower().endswith(suffixes))
        self.names = [name for name in found if not any(map(is_hidden, name.split("/")))]
        for name in sorted({*found} - {*self.names}):
            self.skipped.note("hidden", name)
        self.labels = self._matched(self._labels())
        self.num_classes = max(self.labels.values()) + 1 if self.labels else None

    def __reduce__(self) -> tuple[type[Archive], tuple[str, tuple[str, ...]]]:
        """Opened again in a process that is not a fork of this one."""
        return Archive, (self.path, self.suffixes)

    def read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """The content of that entry. ValueError gives the reason for refusal."""
        if escapes(name):
            raise ValueError("has a name that points out of the archive")
        if self.infos[name].file_size > limit:
            raise ValueError(f"has {self.infos[name].file_size} bytes; {limit} are allowed")
        try:
            with self._file.open(name) as entry:
                content = entry.read(limit + 1)
        except Exception as error:  # zlib, zipfile, encryption, struct: a broken entry has many words
            raise ValueError(f"cannot be read: {error}") from error
        if len(content) > limit:
            raise ValueError(f"has more than {limit} bytes")
        return content

    def fingerprint(self) -> str:
        wanted = [*self.names, *(["dataset.json"] if "dataset.json" in self.infos else [])]
        contents = "\n".join(f"{name} {self.infos[name].CRC} {self.infos[name].file_size}" for name in wanted)
        return text_digest(contents, "surrogateescape")

    def _matched(self, labels: dict[str, int]) -> dict[str, int]:
        """The labels by the names of entries."""
        entries = {normalized_name(name): name for name in self.names}
        if labels and self.names and entries.keys().isdisjoint(labels):
            there, here = next(iter(labels)), self.names[0]
            raise ValueError(
                f"path: {self.path}: no label of dataset.json matches an entry: {there!r} there, {here!r} in the zip"
            )
        for name in labels.keys() - entries.keys() if labels else ():
            self.skipped.note("labels without an entry", name)
        return {entries[name]: label for name, label in labels.items() if name in entries}

    def _labels(self) -> dict[str, int]:
        """By plain names."""
        if "dataset.json" not in self.infos:
            return {}
        try:
            rows = json.loads(self.read("dataset.json", MAX_LABELS_BYTES))["labels"] or []
            found: dict[str, int] = {}
            for name, label in rows:
                number = as_label(label)
                if number is not None and found.setdefault(normalized_name(name), number) != number:
                    raise ValueError(f"{name!r} has the classes {found[normalized_name(name)]} and {label}")
            return found
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'path: {self.path}: dataset.json is not {{"labels": [[name, class], ...]}}: {error}'
            ) from error


def read_array(content: bytes) -> numpy.ndarray:
    """The array of a .npy file. Raises ValueError for a pickled one, one without floats, or a header that promises too
    much.
    """
    stream: Any = io.BytesIO(content)
    try:
        version = numpy.lib.format.read_magic(stream)
        read = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}[version]
        shape, column_major, dtype = read(stream)
    except Exception as error:  # numpy parses the header with more than one parser
        raise ValueError(f"is not an .npy array: {' '.join(str(error).split())[:200]}") from error
    if dtype.hasobject:
        raise ValueError("is a pickled array and is not read")
    if dtype.kind != "f" or min(shape, default=1) < 1:
        raise ValueError(f"holds {dtype} of shape {shape}, not floating-point numbers")
    count, left = 1, len(content) - stream.tell()
    for side in shape:
        count *= side
    if count * dtype.itemsize != left:
        raise ValueError(f"promises {shape} of {dtype} and holds {left} bytes")
    array = numpy.frombuffer(content, dtype, count, offset=stream.tell())
    return array.reshape(shape, order="F" if column_major else "C").astype(numpy.float32)
