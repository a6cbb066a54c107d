"""The starts of all rows of metrics.json: the same noise, conditions and held-out samples for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flowmap.base.distributed import rank, world_size
from flowmap.base.progress import LogFunction, Progress
from flowmap.data import Dataset
from flowmap.evaluation.conditions import classes_by_law, conditions_for
from flowmap.evaluation.held_out import Draws, coupled_draws, held_out_samples
from flowmap.evaluation.known_rows import LOOK
from flowmap.flow.draws import RowGenerator, of_samples
from flowmap.flow.prior import Start, conditioning_rows
from flowmap.flow.types import Cond
from flowmap.metrics import Spec
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student

Batch = tuple[Tensor, Cond, RowGenerator]  # noise, conditions, and what samplers with noise draw from


class Starts:
    """This process's share of the noise and the conditions, drawn batch by batch with progress.

    With W processes the process of rank r has the samples r, r + W, r + 2 W, ... of the whole set.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Student,
        data: Dataset,
        specs: Sequence[Spec],
        guidance: float | None,
        log: LogFunction | None,
    ):
        self.recipe, self.log, self.label = recipe, log, ""
        self.world, self.rank = world_size(), rank()
        self.num = max((spec.num_starts for spec in specs), default=0) // self.world * self.world
        self.num_texts = max((spec.num_texts for spec in specs), default=0) // self.world
        self.device = student.device
        generator, self._unused = (torch.Generator().manual_seed(recipe.evaluation.seed) for _ in range(2))
        self.start, sources = student.start(self.num, generator), data.wanted(self.num)
        if (given := data.starts(self.num)) is not None:
            self.start, sources = Start(given[0]), given[1]
        self.x1 = self.start.x1[self.rank :: self.world]
        self.sources = sources and sources[self.rank :: self.world]
        self.places = torch.arange(self.num)[self.rank :: self.world]
        self.classes = classes_by_law(data, recipe.evaluation.classes) if student.config.num_classes else None
        self._conditions: Callable[[Tensor], Cond] = lambda places: {}
        if self.num:
            self._conditions = conditions_for(student, data, self.num, guidance, self.classes)
        self.held_out: Callable[[int], Draws] = lambda num: held_out_samples(recipe, student, data, num, guidance)
        self.coupled: Callable[[int], Draws] = lambda num: coupled_draws(recipe, student, data, num, guidance)

    @property
    def first(self) -> tuple[Tensor, Cond]:
        """The start of the first samples of every row, and their conditions."""
        return self.start.x1[:LOOK], self._conditions(torch.arange(min(LOOK, self.num)))

    def begin(self, row: str) -> None:
        """Name the row that is measured from here on, and log the name."""
        self.label = f"evaluating: {row}"
        if self.log is not None:
            self.log(self.label)

    def conditions(self, num: int) -> Cond:
        """The conditions of this process's share of the first `num` samples."""
        return self._conditions(self.places[: num // self.world])

    def noise(self, first: int, count: int) -> RowGenerator:
        """What `count` of this process's samples, from `first` on, draw in a sampler that adds noise."""
        return of_samples(self._unused, self.rank + self.world * torch.arange(first, first + count))

    def batches(self, num: int, label: str = "") -> Iterator[Batch]:
        """Yield this process's share of the first `num` starts; a batch is counted when the next is requested."""
        size, num = self.recipe.evaluation.batch_size, num // self.world
        with self.counting(num, label) as count:
            for i in range(0, num, size):
                rows = slice(i, min(i + size, num))
                places = self.places[rows]
                cond = {**self._conditions(places), **conditioning_rows(self.start, places, self.device)}
                yield self.x1[rows].to(self.device), cond, self.noise(i, rows.stop - i)
                count((rows.stop - i) * self.world)

    def counting(self, num: int, label: str) -> Progress:
        """The progress of `num` samples in each process."""
        return Progress(num * self.world, f"{self.label}{label}", self.log)
