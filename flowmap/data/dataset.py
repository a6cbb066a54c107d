"""A built data set: samples in memory, what is held out of training, and what generated samples are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import Batch, Count, Share, check_ranges
from flowmap.base.schema import added
from flowmap.data.order import ORDERS
from flowmap.flow.draws import Generator
from flowmap.flow.parts import Part
from flowmap.flow.types import Cond

StoredCond = Mapping[str, Any]  # tensors, and lists of captions


class BaseData(Part):
    """The optional settings of data, with their defaults.

    images: the source of pictures. autoencoder: makes samples of pictures or sentences. text: encodes captions.
    drop_attribute: the probability with which each attribute of a sentence is dropped.
    """

    images: Any = None
    autoencoder: Any = None
    text: Any = None
    drop_attribute: float = 0.0


@dataclass(frozen=True)
class Source(BaseData):
    """The settings that every source of data has.

    batch_size is for one process and one micro-batch. global_batch_size: the samples of an optimizer step over all
    micro-batches, devices and nodes; null for as many as they add up to. conditional: labels, if there are any, are
    given to the network, and dropped with probability drop_condition so that it also learns the velocity without a
    class. shuffle: "global", a random order of all samples in each epoch, or "blocks", a random order of blocks of 128
    consecutive samples, mixed within each 128 blocks, for data larger than memory on a disk that is slow at random
    reads.
    """

    batch_size: Batch = 128
    conditional: bool = True
    drop_condition: Share = 0.0
    global_batch_size: Count | None = added(None)
    shuffle: str = added("global")
    in_pixels: ClassVar[bool] = True  # samples of three dimensions are pictures in [-1, 1]
    quick: ClassVar[bool] = True  # build() takes seconds, so that it may be called to look at the sizes alone

    def outline(self) -> tuple[tuple[int, ...], int | None] | None:
        """(shape of a sample, number of classes) where the settings determine them without the data; otherwise None."""
        return None

    def __post_init__(self):
        check_ranges(self)
        if self.shuffle not in ORDERS:
            raise ValueError(f"shuffle: {self.shuffle!r} is not one of {', '.join(ORDERS)}")


class BaseDataset:
    """The optional members of a data set, with their defaults.

    reads_disk: whether each batch is read from files; otherwise samples are in memory. note: what figures must say of
    the samples, if they are not real data.

    `__getitems__` and `conditions_at` return complete conditions, float32. A worker of the loader instead reads what is
    stored (`stored_batch`, `stored_conditions_at`); the training process computes what is missing (`complete`) and
    converts float16, of which a worker can send twice as much, on its device (`full_precision`).
    """

    reads_disk: ClassVar[bool] = False

    @property
    def note(self) -> str | None:
        return None

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        raise NotImplementedError

    def conditions_at(self, places: Tensor) -> Cond:
        raise NotImplementedError

    def stored_batch(self, indices: Sequence[int]) -> tuple[Tensor, StoredCond]:
        """The batch (x0, conditions) as a worker of the loader reads it."""
        return self.__getitems__(indices)

    def stored_conditions_at(self, places: Tensor) -> StoredCond:
        """The conditions of those training samples as a worker of the loader reads them."""
        return self.conditions_at(places)

    def complete(self, cond: StoredCond) -> Cond:
        """The conditions, of those that are stored, on any device."""
        return cond

    def to_device(self, device: torch.device) -> None:
        """Complete conditions on that device from now on."""

    def hold_text(self, dtype: torch.dtype | None) -> None:
        """Complete conditions by a text encoder with weights of that dtype from now on; None: that of its files."""

    def captions_at(self, places: Tensor, *, held_out: bool) -> list[str] | None:
        """The captions of those training samples, or held-out ones; None where the data has none."""
        return None

    def example_conditions(self) -> Cond:
        """One row of each condition, for its name and shape."""
        return self.conditions_at(torch.zeros(1, dtype=torch.int64))

    def wanted(self, num: int) -> list[str] | None:
        """The true middle parts at the first `num` places of an evaluation; None where nothing is infilled."""
        return None

    def starts(self, num: int) -> tuple[Tensor, list[str]] | None:
        """x1 and its sentences for an evaluation of `num` samples; None where samples start from the prior."""
        return None

    def partners(self, x0: Tensor, generator: Generator) -> Tensor | None:
        """x1 (B, ...) that the data pairs with x0; None where the coupling draws it."""
        return None

    def sentence_counts(self) -> dict[str, int] | None:
        """How many sentences are trained on, held out and left out; None where there are none."""
        return None


@dataclass(frozen=True, eq=False)
class Dataset(BaseDataset):
    """Samples in memory, read a batch at a time.

    train, held_out and reference are float32, (N, *shape); images are scaled to [-1, 1]. Labels are (N,) int64 in 0 ..
    num_classes - 1, or -1 for a sample without a class. class_names, where known, are num_classes texts. Raises
    ValueError where these do not fit together. Generated samples are compared with held_out, and with reference, the
    training samples, as is usual for Frechet distances. For `torch.utils.data.DataLoader(dataset,
    batch_sampler=StepBatches(...), collate_fn=as_it_is)`.
    """

    name: str
    train: Tensor
    held_out: Tensor
    labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self):
        for labels, part in ((self.labels, "training"), (self.held_out_labels, "held-out")):
            check_labels(labels, self.num_classes, f"{self.name}: {part} sample")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"data: {self.name}: {len(self.class_names)} class names for {self.num_classes} classes")

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape: (1, 8, 8) for digits, (2,) for points."""
        return tuple(self.train.shape[1:])

    @property
    def reference(self) -> Tensor:
        return self.train

    @property
    def reference_labels(self) -> Tensor | None:
        """(N,) int64, row by row as in `reference`; None where there are none."""
        return self.labels

    @property
    def empty(self) -> Mapping[str, Tensor]:
        """One row of each condition as an empty text gives it; {} where there is no text."""
        return {}

    def conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those training samples."""
        return {} if self.labels is None else {"class": self.labels[places]}

    def reference_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those samples of the reference; {} where there are none."""
        return {} if self.labels is None else {"class": self.labels[places]}

    def held_out_samples(self, num: int | None = None) -> tuple[Tensor, Cond]:
        """(x0, cond) of the first `num` held-out samples (None: all), as training would see them.

        Row by row as in `held_out`.
        """
        return self.held_out[:num], {} if self.held_out_labels is None else {"class": self.held_out_labels[:num]}

    @property
    def num_reference(self) -> int:
        return len(self.reference)

    @property
    def reference_shape(self) -> tuple[int, ...]:
        """Of one sample of the reference: a picture's where the samples are latents of an autoencoder."""
        return self.shape

    @property
    def num_held_out(self) -> int:
        return len(self.held_out)

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those held-out samples."""
        return {} if self.held_out_labels is None else {"class": self.held_out_labels[places]}

    def __len__(self) -> int:
        return len(self.train)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        """The batch (x0, cond) of these training samples: x0 (B, *shape), cond {"class": (B,)} or {}."""
        rows = list(indices)
        return self.train[rows], {} if self.labels is None else {"class": self.labels[rows]}

    def __getitem__(self, index: int) -> tuple[Tensor, Cond]:
        """One sample and its cond, without a batch dimension."""
        return self.train[index], {} if self.labels is None else {"class": self.labels[index]}


def full_precision(value: Any) -> Any:
    """float16 as float32, exactly; anything else unchanged."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def check_labels(labels: Tensor | None, num_classes: int | None, what: str) -> None:
    """ValueError, with `what` and its number, for the first label that is not in -1 .. num_classes - 1."""
    if labels is None or num_classes is None:
        return
    wrong = ((labels < -1) | (labels >= num_classes)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"data: {what} {place} has label {int(labels[place])}, not one of 0..{num_classes - 1} (or -1: no class)"
        )


def looked_at(places: Tensor, rows: int) -> Tensor:
    """The samples, of `rows`, at those places of an evaluation.

    All are taken in a fixed random order, so that the first ones are a fair sample of a sorted source; then they
    repeat.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[places % rows]


def held_out_count(wanted: int | None, samples: int) -> int:
    """How many of `samples` are held out: as many as are wanted; None: a tenth of them, at most 1,000."""
    return min(1000, samples // 10) if wanted is None else wanted


def as_it_is(batch):
    """The batch unchanged: the `collate_fn` of a Dataset, as its `__getitems__` returns whole batches."""
    return batch
