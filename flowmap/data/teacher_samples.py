"""Samples of the recipe's own teacher as x0, where a user has the teacher and not its data.

They are kept as pairs (pairs.py) whose noise is not read: sample i and its class are a function of (seed, i). The first
`num` are trained on; `held_out` further ones are what metrics compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Classes, Count, CountFromZero, FromZero, Seed
from flowmap.data import shards
from flowmap.data.dataset import BaseDataset, Dataset, Source, held_out_count
from flowmap.data.pairs import DTYPES, FORMAT, Pairs, TeacherSlot, unpack
from flowmap.data.shards import Made, check_sums, from_column, open_shards
from flowmap.data.stored import StoredSamples
from flowmap.flow.solver import Euler, Solver
from flowmap.flow.types import Cond, RecipeView

MADE = Made("data.root", "samples of a teacher", "flowmap pairs", FORMAT)
ROWS = 32  # of Blank


@dataclass(frozen=True)
class TeacherSamples(Source):
    """`num` samples of the recipe's teacher as data, made once and stored; class i mod num_classes for sample i.

    steps       Euler steps of each sample (default 50); solver: another way to solve the ODE, in place of steps
    guidance    the one scale of all samples, by default that of the teacher's guidance
    held_out    further samples for metrics, not trained on (null: a tenth of num, at most 1,000)
    shape, num_classes  of the samples, where neither a card nor the recipe that trains the teacher states them
    pictures    samples of three dimensions are pictures in [-1, 1]; false for latents
    dtype       on disk; "auto" is uint8 for pictures and float16 for other samples
    root        the folder, by default in runs/

    Metrics compare the student with its teacher alone, and the figures say so.
    """

    num: Count = 50_000
    steps: Calls | None = None
    solver: Solver | None = None
    guidance: FromZero | None = None
    held_out: CountFromZero | None = None
    shape: tuple[Classes, ...] = ()
    num_classes: Classes | None = None
    pictures: bool = True
    seed: Seed = 1
    dtype: str = "auto"
    shard_items: Count = 1000
    root: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.solver is not None:
            raise ValueError("steps: give steps (of Euler) or a solver, which has its own")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def in_pixels(self) -> bool:  # type: ignore[override]
        return self.pictures

    @property
    def num_held_out(self) -> int:
        return held_out_count(self.held_out, self.num)

    def check(self, recipe: RecipeView) -> None:
        if recipe.teacher is None:
            raise ValueError("data: teacher_samples are those of the recipe's teacher, and it has none")
        if self.guidance is not None and recipe.teacher.guidance is None:
            what = "wants teacher.guidance, which says what is guided and how"
            raise ValueError(f"data.guidance: {self.guidance} {what}")
        if isinstance(recipe.coupling, Pairs) and recipe.coupling.seed == self.seed:
            what = f"{self.seed} is that of data.seed: the held-out samples would be among the pairs"
            raise ValueError(f"coupling.seed: {what}; choose another")

    def outline(self) -> tuple[tuple[int, ...], int | None] | None:
        return (tuple(self.shape), self.num_classes) if self.shape else None

    def pairs(self, teacher: TeacherSlot) -> Pairs:
        """The pairs whose x0 the samples are, the held-out ones last."""
        return Pairs(
            teacher=teacher,
            guidance=self.guidance,
            num=self.num + self.num_held_out,
            solver=self.solver or Euler(steps=50 if self.steps is None else self.steps),
            seed=self.seed,
            dtype=self.dtype,
            shard_items=self.shard_items,
            root=self.root,
        )

    def blank(self) -> Blank:
        """What the pairs are made of."""
        return Blank(
            batch_size=self.batch_size,
            global_batch_size=self.global_batch_size,
            conditional=self.conditional,
            shape=self.shape,
            num_classes=self.num_classes,
            pictures=self.pictures,
        )

    def build(self) -> TeacherSamplesDataset:
        """The finished samples, opened. Raises ValueError if they are incomplete, of another number, or torn."""
        if not self.root:
            raise ValueError("data.root: is required: the folder of the teacher's samples")
        return TeacherSamplesDataset(self, Path(self.root))


@dataclass(frozen=True)
class Blank(Source):
    """The shape and the classes of samples that are still to be made."""

    shape: tuple[int, ...] = ()
    num_classes: int | None = None
    pictures: bool = True

    @property
    def in_pixels(self) -> bool:  # type: ignore[override]
        return self.pictures

    def outline(self) -> tuple[tuple[int, ...], int | None] | None:
        return tuple(self.shape), self.num_classes

    def build(self) -> Dataset:
        labels = None if self.num_classes is None else torch.arange(ROWS) * self.num_classes // ROWS
        x0 = torch.zeros(ROWS, *self.shape)
        return Dataset("no data", x0, x0[:0], labels, None if labels is None else labels[:0], self.num_classes)


class TeacherSamplesDataset(BaseDataset):
    """A data set (see data/dataset.py) of the teacher's samples on disk."""

    reads_disk: ClassVar[bool] = True
    class_names: ClassVar[None] = None
    empty: ClassVar[Cond] = {}

    def __init__(self, spec: TeacherSamples, folder: Path):
        self.folder, self.name, self.index = folder, folder.name, shards.read_index(folder, MADE)
        self.shape = tuple(self.index["contents"]["shape"])
        self.num_classes: int | None = self.index["contents"]["num_classes"]
        self.num_reference, self.num_held_out = spec.num, spec.num_held_out
        if self.index["rows"] != spec.num + spec.num_held_out:
            what = f"holds {self.index['rows']} samples, not {spec.num} and {spec.num_held_out} held out"
            raise ValueError(f"data.root: {folder}: {what}")
        check_sums(folder, self.index, MADE)
        self._table = open_shards(folder, self.index["shards"], MADE)
        self._labels = torch.from_numpy(self._table.data.column("label").to_numpy().copy())

    @property
    def note(self) -> str:
        made_by = self.index["identity"]["teacher"].get("card")
        of = f"samples of the teacher {made_by!r}"
        return f"all data are {of}: figures compare with further samples of it, not with real data"

    def __len__(self) -> int:
        return self.num_reference

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        """The batch (x0, cond) of these training samples: x0 float32 (B, *shape), cond {"class": (B,)} or {}."""
        rows = torch.as_tensor(list(indices))
        return self._read(rows), self.conditions_at(rows)

    def conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those training samples."""
        return {} if self.num_classes is None else {"class": self._labels[places]}

    def reference_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those samples of the reference, which are the training samples."""
        return self.conditions_at(places)

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        """The conditions of those held-out samples."""
        return self.conditions_at(self.num_reference + places)

    def held_out_samples(self, num: int | None = None) -> tuple[Tensor, Cond]:
        """(x0, cond) of the first `num` held-out samples (None: all), as training would see them."""
        places = torch.arange(self.num_held_out)[:num]
        return self.held_out[places], self.held_out_conditions_at(places)

    @property
    def held_out(self) -> StoredSamples:
        return self._stored(self.num_held_out, lambda places: self._read(self.num_reference + places))

    @property
    def reference(self) -> StoredSamples:
        return self._stored(self.num_reference, self._read)

    @property
    def reference_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 of the training samples; None where there are none."""
        return None if self.num_classes is None else self._labels[: self.num_reference]

    @property
    def reference_labels(self) -> Tensor | None:
        return self.labels

    @property
    def held_out_labels(self) -> Tensor | None:
        """(N,) int64 of the held-out samples; None where there are none."""
        return None if self.num_classes is None else self._labels[self.num_reference :]

    def _stored(self, count: int, read: Callable[[Tensor], Tensor]) -> StoredSamples:
        return StoredSamples(count, self.shape, read)

    def _read(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return torch.zeros(0, *self.shape)
        table: Any = self._table[rows.tolist()]
        return unpack(from_column(table, "x0", self.shape))
