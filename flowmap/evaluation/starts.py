"""The starts of all rows of metrics.json: the same noise, conditions and held-out samples for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flowmap.base.batches import rebatched
from flowmap.base.distributed import rank, world_size
from flowmap.base.progress import LogFunction, Progress
from flowmap.data import Dataset
from flowmap.evaluation.conditions import captions_in, classes_by_law, conditions_for
from flowmap.evaluation.held_out import Draws, coupled_draws, held_out_samples
from flowmap.evaluation.known_rows import LOOK
from flowmap.flow.draws import RowGenerator, of_samples
from flowmap.flow.prior import Start
from flowmap.flow.types import Cond
from flowmap.metrics import Spec
from flowmap.metrics.real import chunk_of
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student

Batch = tuple[Tensor, Cond, RowGenerator]  # noise, conditions, and what samplers with noise draw from


class Starts:
    """This process's share of the noise and the conditions, drawn again for each row, batch by batch with progress.

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
        self._unused = torch.Generator().manual_seed(recipe.evaluation.seed)
        self.chunk = chunk_of(data.reference_shape)  # samples that are decoded and measured at once
        self._blocks = lambda: student.start_blocks(self.num, torch.Generator().manual_seed(recipe.evaluation.seed))
        self._given, self.sources = data.starts(self.num), data.wanted(self.num)
        if self._given is not None:
            self.sources = self._given[1]
        self.places = torch.arange(self.num)[self.rank :: self.world]
        self.classes = classes_by_law(data, recipe.evaluation.classes) if student.config.num_classes else None
        self._captions = captions_in(recipe.evaluation.captions)
        self._conditions: Callable[[Tensor], Cond] = lambda places: {}
        if self.num:
            self._conditions = conditions_for(student, data, self.num, guidance, self.classes, self._captions)
        self.held_out: Callable[[int], Draws] = lambda num: held_out_samples(recipe, student, data, num, guidance)
        self.coupled: Callable[[int], Draws] = lambda num: coupled_draws(recipe, student, data, num, guidance)

    @property
    def first(self) -> tuple[Tensor, Cond]:
        """The start of the first samples of every row, and their conditions."""
        points = next(iter(self._points()), Start(torch.zeros(0)))
        return points.x1[:LOOK], self._conditions(torch.arange(min(LOOK, self.num)))

    def begin(self, row: str) -> None:
        """Name the row that is measured from here on, and log the name."""
        self.label = f"evaluating: {row}"
        if self.log is not None:
            self.log(self.label)

    def conditions(self, num: int) -> Cond:
        """The conditions of the first `num` samples of all processes."""
        return self._conditions(torch.arange(num // self.world * self.world))

    def conditions_at(self, first: int, count: int) -> Cond:
        """The conditions of `count` of this process's samples, from `first` on."""
        return self._conditions(self.places[first : first + count])

    def captions_at(self, first: int, count: int) -> list[str]:
        """The captions of those samples; [] where evaluation.captions gives none."""
        return [] if self._captions is None else self._captions(self.places[first : first + count])

    def noise(self, first: int, count: int) -> RowGenerator:
        """What `count` of this process's samples, from `first` on, draw in a sampler that adds noise."""
        return of_samples(self._unused, self.rank + self.world * torch.arange(first, first + count))

    def batches(self, num: int, label: str = "") -> Iterator[Batch]:
        """Yield this process's share of the first `num` starts; a batch is counted when the next is requested."""
        first = 0
        with self.counting(num // self.world, label) as count:
            for start in rebatched(self._own(num // self.world), self.recipe.evaluation.batch_size):
                x1, size = start["x1"].to(self.device), len(start["x1"])
                codes = {key: value.to(self.device) for key, value in start.items() if key != "x1"}
                yield x1, {**self.conditions_at(first, size), **codes}, self.noise(first, size)
                first += size
                count(size * self.world)

    def _own(self, num: int) -> Iterator[dict[str, Tensor]]:
        """The first `num` start points of this process, and what the network is conditioned on, block by block."""
        left = num * self.world  # of all processes
        done = 0
        for block in self._points():
            own = slice((self.rank - done) % self.world, max(left, 0), self.world)
            yield {"x1": block.x1[own], **{key: value[own] for key, value in block.conditioning.items()}}
            done, left = done + len(block.x1), left - len(block.x1)
            if left <= 0:
                return

    def _points(self) -> Iterator[Start]:
        """The start points of all processes, block by block."""
        return self._blocks() if self._given is None else iter([Start(self._given[0])])

    def counting(self, num: int, label: str) -> Progress:
        """The progress of `num` samples in each process."""
        return Progress(num * self.world, f"{self.label}{label}", self.log)
