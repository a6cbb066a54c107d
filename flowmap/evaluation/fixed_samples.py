"""Samples from noise and conditions that stay the same during a run, so that those of any two steps can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from flowmap.base.images import to_grid, to_tiles
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.evaluation.columns import LoadedTeacher, solved_from, starts_of
from flowmap.evaluation.conditions import condition_labels, conditions_for
from flowmap.evaluation.samples import BATCH
from flowmap.flow.prior import Start
from flowmap.flow.types import Cond
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student

Samples = Tensor | list[str]
Cell = Image.Image | str
TEACHER, SOURCE = "teacher", "source"


class FixedSamples:
    """The first log.grid_images samples of a recipe's evaluation: same noise and conditions at every step.

    Sample i depends on evaluation.seed and on i alone.
    """

    def __init__(self, recipe: Recipe, student: Student, data: Dataset):
        self.recipe, self.student, self.data = recipe, student, data
        self.num, self.seed = recipe.log.grid_images, recipe.evaluation.seed

    def conditions(self) -> Cond:
        return conditions_for(self.student, self.data, self.num)(torch.arange(self.num))

    def of_student(self, steps: int, cond: Cond) -> Samples:
        """Pictures, points or sentences of the student at that number of steps."""
        if self._edited is None:
            return self.student.sample(self.num, steps=steps, cond=cond, seed=self.seed)
        rows = self.student.conditions(self.num, cond)
        return self.student.carry(Start(self._edited[0]), rows, steps, torch.Generator().manual_seed(self.seed))

    def of_teacher(self, teacher: BuiltTeacher, cond: Cond) -> Samples:
        """The teacher's samples in evaluation.teacher_steps steps."""
        loaded = LoadedTeacher(teacher, self.recipe.evaluation.teacher_steps)
        if self._edited is None:
            x1, rows = starts_of(self.student, self.num, cond, None, self.seed)
        else:
            x1, rows = self._edited[0].to(self.student.device), cond
        size = min(BATCH, self.recipe.evaluation.batch_size)
        return solved_from(self.student, loaded, x1, rows, batch_size=size)

    @property
    def sources(self) -> list[str] | None:
        """The sentences that an editing student starts from."""
        return None if self._edited is None else self._edited[1]

    @cached_property
    def _edited(self) -> tuple[Tensor, list[str]] | None:
        return self.data.starts(self.num) if self.student.config.edits else None


@dataclass(frozen=True)
class SampleTable:
    """Samples side by side: a row for each noise and condition, a column for each number of steps and the teacher."""

    seed: int
    conditions: Sequence[str]
    cells: Mapping[str, Sequence[Cell]]  # by column

    @property
    def columns(self) -> list[str]:
        return ["step", "seed", "sample", "condition", *self.cells]

    def rows(self, step: int) -> list[list[int | Cell]]:
        """The rows after so many training steps."""
        columns = zip(self.conditions, *self.cells.values(), strict=True)
        return [[step, self.seed, i, *row] for i, row in enumerate(columns)]


def sample_table(fixed: FixedSamples, cond: Cond, cells: Mapping[str, Sequence[Cell]]) -> SampleTable:
    """The table of these cells (`cells_of`), with the conditions in words; points have one row, their density."""
    num = len(next(iter(cells.values())))
    points = len(fixed.student.config.shape) == 1 and fixed.student.config.text_autoencoder is None
    labels = [""] * num if points else condition_labels(fixed.student, fixed.data, cond, num)
    return SampleTable(fixed.seed, labels, cells)


def cells_of(samples: Samples, num: int) -> list[Cell]:
    """The first `num` samples as pictures or sentences; of points the density of all, one picture."""
    if not isinstance(samples, Tensor):
        return [" ".join(text.splitlines()) for text in samples[:num]]
    if samples.ndim == 2:
        return [to_grid(samples)]
    return [*to_tiles(samples[:num].float())]
