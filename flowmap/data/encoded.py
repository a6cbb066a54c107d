"""Pictures that `flowmap encode` has encoded as latents and text embeddings: memory-mapped Arrow shards.

The folder is one of shards (shards.py), each a fixed range of the source's positions, with empty.safetensors (the
encoding of "") and reference.safetensors (pictures for metrics, uint8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.images import from_bytes
from flowmap.base.ranges import Count, CountFromZero, Seed
from flowmap.base.schema import added
from flowmap.data import shards
from flowmap.data.dataset import BaseDataset, Source, StoredCond, full_precision
from flowmap.data.live_text import LiveText
from flowmap.data.shards import Made, check_sums, difference, from_column, from_trimmed_column, open_shards
from flowmap.data.sources import ImageSource
from flowmap.data.stored import StoredSamples
from flowmap.flow.types import Cond

FORMAT = 2  # 1: without counts of what was skipped and samples of each class; pictures were read without EXIF
EMPTY, REFERENCE = "empty.safetensors", "reference.safetensors"
STORED_TEXT = ("padded", "trimmed", "captions")
CAPTIONS = "captions"  # the stored condition that becomes text embeddings
TEXT, MASK = "cond_text", "cond_text_mask"
MADE = Made("data.root", "encoding", "flowmap encode", FORMAT)


class Autoencoder(Protocol):
    """The settings of a frozen autoencoder.

    load() returns encode(x (B, C, H, W) in [-1, 1]) -> normalised latents (B, c, h, w), and decode(z).
    """

    @property
    def source(self) -> str | None: ...

    def load(self) -> Any: ...

    def identity(self) -> dict[str, Any]:
        """Plain values: the encoder's id, revision, normalisation and hash of weights."""
        ...


class TextEncoder(Protocol):
    """The settings of a frozen text encoder.

    load() returns a call list[str] -> {"text" (B, L, D), "text_mask" (B, L) bool, "pooled" (B, P)} or some of these.
    max_tokens: the number of tokens of a text that it encodes, None where its pipeline determines it.
    """

    @property
    def max_tokens(self) -> int | None: ...

    def load(self) -> Any: ...

    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Encoded(Source):
    """Pictures as latents of an autoencoder, and captions as text embeddings, made by `flowmap encode` and stored in
    `root`.

    autoencoder         none: the pictures themselves are stored, uint8
    text                none: classes only; a missing caption counts as ""
    stored_text         "padded": embeddings of all positions; "trimmed": those of real tokens, for encoders with a
                        mask (others are 0 when they are read); "captions": none, they are computed in training
    flip                each picture is also encoded mirrored, as a sample of its own
    held_out            samples for metrics, not trained on, drawn by `seed` (null: a tenth, at most 1,000)
    reference_images    training samples for metrics, drawn by `seed`
    shard_items         positions of the source in a shard

    Held-out and reference samples are stored as pictures; of a stream both come from its start.
    """

    images: ImageSource = field()  # required, though BaseData has a default
    autoencoder: Autoencoder | None = None
    text: TextEncoder | None = None
    root: str = ""
    held_out: CountFromZero | None = None
    reference_images: Count = 10_000
    shard_items: Count = 1000
    flip: bool = False
    seed: Seed = 0
    stored_text: str = added("padded")

    def __post_init__(self):
        super().__post_init__()
        if self.stored_text not in STORED_TEXT:
            raise ValueError(f"stored_text: {self.stored_text!r} is not one of {', '.join(STORED_TEXT)}")
        if self.stored_text != "padded" and self.text is None:
            raise ValueError(f"stored_text: {self.stored_text!r} wants text, the encoder of the captions")

    @property
    def in_pixels(self) -> bool:  # type: ignore[override]  # a constant of the other kinds
        return self.autoencoder is None

    def identity(self) -> dict[str, Any]:
        """Everything that the stored samples depend on, as JSON would give it back."""
        parts = {"source": self.images, "autoencoder": self.autoencoder, "text": self.text}
        identities = {key: None if part is None else part.identity() for key, part in parts.items()}
        stored = {} if self.stored_text == "padded" else {"stored_text": self.stored_text}
        return json.loads(json.dumps({"format": FORMAT, **identities, "flip": self.flip, **stored}))

    def chosen(self) -> dict[str, int | None]:
        """Everything that the choice of held-out and reference samples depends on."""
        return {"held_out": self.held_out, "reference_images": self.reference_images, "seed": self.seed}

    def build(self) -> EncodedDataset:
        """The finished encoding, opened. Raises ValueError if it is incomplete, of something else, or torn."""
        if not self.root:
            raise ValueError("data.root: is required: the folder that `flowmap encode` filled")
        return EncodedDataset(self, Path(self.root))


class EncodedDataset(BaseDataset):
    """A data set (see data/dataset.py) of samples on disk.

    held_out and reference are pictures (N, C, size, size) in [-1, 1], whatever the samples are; they are read from the
    disk when they are indexed.
    """

    reads_disk: ClassVar[bool] = True

    def __init__(self, spec: Encoded, folder: Path):
        self.folder, self.name = folder, folder.name
        self.index = read_index(folder)
        found = difference({**self.index["identity"], **self.index["chosen"]}, {**spec.identity(), **spec.chosen()})
        if found:
            raise ValueError(
                f"data.root: {folder}: holds another encoding: {found}; `flowmap encode` makes it for this recipe"
            )
        self.shape, self.num_classes = tuple(self.index["shape"]), self.index["num_classes"]
        names = self.index.get("class_names")
        self.class_names = tuple(names) if names else None
        self._columns = {
            name: (tuple(column["shape"]), column["dtype"]) for name, column in self.index["columns"].items()
        }
        check_sums(folder, self.index, MADE)
        self._table = open_shards(folder, [shard for shard in self.index["shards"] if shard["rows"]], MADE)
        self._flip, self._trimmed, self._captioned = spec.flip, spec.stored_text == "trimmed", spec.text is not None
        self._live = LiveText(spec.text) if spec.stored_text == "captions" and spec.text is not None else None

    def __len__(self) -> int:
        return len(self._kept) * (2 if self._flip else 1)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        """The batch (x0, cond) of these training samples: x0 float32 (B, *shape), cond with "class", "text" and the
        like.
        """
        x0, cond = self.stored_batch(indices)
        return full_precision(x0), self._completed(cond)

    def stored_batch(self, indices: Sequence[int]) -> tuple[Tensor, StoredCond]:
        rows = torch.as_tensor(list(indices))
        mirrored, rows = rows >= len(self._kept), self._kept[rows % len(self._kept)]
        table = self._rows(rows)
        x0 = self._column(table, "x0")
        if self._flip:
            x0 = torch.where(mirrored.view(-1, *[1] * len(self.shape)), self._column(table, "mirrored"), x0)
        return x0, self._conditions(table)

    def conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those training samples."""
        return self._completed(self.stored_conditions_at(places))

    def stored_conditions_at(self, places: Tensor) -> StoredCond:
        return self._conditions(self._rows(self._kept[places % len(self._kept)]))

    def captions_at(self, places: Tensor, *, held_out: bool) -> list[str] | None:
        if not self._captioned:
            return None
        rows = self._rows_of("held_out")[places] if held_out else self._kept[places % len(self._kept)]
        return [caption or "" for caption in self._rows(rows)["caption"].to_pylist()]

    def complete(self, cond: StoredCond) -> Cond:
        if self._live is None:
            return cond
        return {name: value for name, value in cond.items() if name != CAPTIONS} | self._live(cond[CAPTIONS])

    def to_device(self, device: torch.device) -> None:
        if self._live is not None:
            self._live.to(device)

    def hold_text(self, dtype: torch.dtype | None) -> None:
        if self._live is not None:
            self._live.hold(dtype)

    def example_conditions(self) -> Cond:
        """One row of each condition, for its name and shape; no text encoder is loaded."""
        cond = self.stored_conditions_at(torch.zeros(1, dtype=torch.int64))
        return {name: value for name, value in cond.items() if name != CAPTIONS} | dict(self.empty)

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) int64, -1 where a sample has no class; None where there are none."""
        if self.num_classes is None:
            return None
        labels = torch.from_numpy(self._table.data.column("label").to_numpy().copy())[self._kept]
        return labels.repeat(2) if self._flip else labels

    @cached_property
    def empty(self) -> Mapping[str, Tensor]:
        """One row of each text condition: the encoding of ""; {} where there is no text."""
        if not (self.folder / EMPTY).is_file():
            return {}
        with _safetensors(self.folder / EMPTY) as file:
            return {name: _as_cond(file.get_tensor(name)) for name in file.keys()}

    @cached_property
    def held_out(self) -> StoredSamples:
        return _pictures(self.folder / REFERENCE, "held_out")

    @cached_property
    def reference(self) -> StoredSamples:
        return _pictures(self.folder / REFERENCE, "reference")

    @property
    def reference_labels(self) -> Tensor | None:
        """(N,) int64, row by row as in `reference`; None where there are none."""
        return self._labels_of("reference")

    def reference_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those samples of the reference."""
        return self._conditions_of(self._rows_of("reference")[places])

    def held_out_samples(self, num: int | None = None) -> tuple[Tensor, Cond]:
        """(x0, cond) of the first `num` held-out samples (None: all), as training would see them.

        Row by row as in `held_out`.
        """
        rows = self._rows_of("held_out")[:num]
        if not len(rows):
            return torch.zeros(0, *self.shape), {}
        table = self._rows(rows)
        return full_precision(self._column(table, "x0")), self._completed(self._conditions(table))

    @property
    def num_reference(self) -> int:
        return len(self._rows_of("reference"))

    @property
    def reference_shape(self) -> tuple[int, ...]:
        """Of one picture of the reference."""
        return tuple(self.reference.shape[1:])

    @property
    def num_held_out(self) -> int:
        return len(self._rows_of("held_out"))

    @property
    def held_out_labels(self) -> Tensor | None:
        """(N,) int64, -1 where a held-out sample has no class; None where there are none."""
        return self._labels_of("held_out")

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those held-out samples."""
        return self._conditions_of(self._rows_of("held_out")[places])

    def _conditions_of(self, rows: Tensor) -> Cond:
        return self._completed(self._conditions(self._rows(rows)))

    def _completed(self, cond: StoredCond) -> Cond:
        """`complete` on the CPU, in full precision."""
        return {name: full_precision(value.cpu()) for name, value in self.complete(cond).items()}

    def _rows_of(self, name: str) -> Tensor:
        with _safetensors(self.folder / REFERENCE) as file:
            return file.get_tensor(f"{name}_rows")

    def _labels_of(self, name: str) -> Tensor | None:
        if self.num_classes is None:
            return None
        return torch.from_numpy(self._table.data.column("label").to_numpy().copy())[self._rows_of(name)]

    @cached_property
    def _kept(self) -> Tensor:
        """The rows trained on."""
        kept = torch.ones(len(self._table), dtype=torch.bool)
        kept[self._rows_of("held_out")] = False
        return kept.nonzero().flatten()

    def _rows(self, rows: Tensor) -> Any:
        return self._table[rows.tolist()]

    def _conditions(self, table: Any) -> dict[str, Any]:
        names = [name for name in self._columns if name.startswith("cond_")]
        cond: dict[str, Any] = {name.removeprefix("cond_"): self._column(table, name) for name in names}
        if self._live is not None:
            cond[CAPTIONS] = [caption or "" for caption in table["caption"].to_pylist()]
        if self.num_classes is not None:
            cond["class"] = torch.from_numpy(table["label"].to_numpy().copy())
        return cond

    def _column(self, table: Any, name: str) -> Tensor:
        shape, dtype = self._columns[name]
        if name == TEXT and self._trimmed:
            return from_trimmed_column(table, name, self._column(table, MASK), shape[-1])
        values = from_column(table, name, shape)
        if name in ("x0", "mirrored"):
            return from_bytes(values) if dtype == "uint8" else values
        return values.bool() if dtype == "bool" else values


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a complete encoding. Raises ValueError with the progress of an incomplete one."""
    return shards.read_index(folder, MADE)


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: is missing or not a whole safetensors file: {error}; `flowmap encode` makes it again"
        ) from error


def _pictures(path: Path, name: str) -> StoredSamples:
    """The pictures of that name in the file."""
    with _safetensors(path) as file:
        count, *shape = file.get_slice(name).get_shape()
    return StoredSamples(count, tuple(shape), partial(_read_pictures, path, name))


def _read_pictures(path: Path, name: str, places: Tensor) -> Tensor:
    """The pictures at those places; the file is mapped into memory, not read as a whole."""
    with _safetensors(path) as file:
        return from_bytes(file.get_tensor(name)[places])


def _as_cond(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.bool else tensor.float()
