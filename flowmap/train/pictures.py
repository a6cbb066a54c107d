"""The samples that a run draws while it trains: files in samples/, and pictures and a table of them in W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from flowmap.base.files import write_text
from flowmap.base.images import save_picture, stack, steps_label, steps_name, to_grid
from flowmap.evaluation.fixed_samples import SOURCE, TEACHER, Cell, FixedSamples, Samples, cells_of, sample_table
from flowmap.flow.types import Cond
from flowmap.plan.plan import Stage
from flowmap.student.student import Student
from flowmap.train.callbacks import AtPictures
from flowmap.train.logging import log_pictures, log_table
from flowmap.train.module import DistillModule

Shown = Image.Image | list[str]  # a grid, or sentences


class Pictures(AtPictures):
    """Draws samples/step-N.png, or writes samples/step-N.txt: the averaged student at each number of steps, then the
    teacher, all from the same noise. The table has the first log.table_samples of them.
    """

    def __init__(self, stage: Stage, student: Student):
        super().__init__(stage)
        self.student = student
        self._teacher: tuple[Shown, list[Cell]] | None = None

    @torch.no_grad()
    def show(self, trainer: L.Trainer, module: DistillModule, done: int) -> None:
        fixed = FixedSamples(self.stage.recipe, self.student, module.data)
        cond = fixed.conditions()
        shown: dict[str, Shown] = {}
        cells: dict[str, list[Cell]] = {}
        if fixed.sources is not None:
            shown[SOURCE], cells[SOURCE] = self._both(fixed.sources)
        for k in self.stage.recipe.sampler.steps:
            name = steps_name(k)
            shown[name], cells[name] = self._both(fixed.of_student(k, cond))
        if module.teacher is not None:
            if self._teacher is None:
                self._teacher = self._both(fixed.of_teacher(module.teacher, cond))
            shown[TEACHER], cells[TEACHER] = self._teacher
        if trainer.is_global_zero:
            self._write(trainer, shown, done)
            self._log_table(trainer, fixed, cond, cells, done)

    def _both(self, samples: Samples) -> tuple[Shown, list[Cell]]:
        """What is shown of samples, and their cells in the table."""
        shown = to_grid(samples, columns=16) if isinstance(samples, Tensor) else samples
        return shown, cells_of(samples, self.stage.recipe.log.table_samples)

    def _write(self, trainer: L.Trainer, shown: Mapping[str, Any], done: int) -> None:
        path = self.stage.folder / "samples" / f"step-{done:08d}"
        if self.student.config.text_autoencoder is not None:
            lines = (line for name, texts in shown.items() for line in (f"# {name}", *texts))
            write_text(path.with_suffix(".txt"), "\n".join(lines) + "\n")
            return
        labels = [steps_label("student", k) for k in self.stage.recipe.sampler.steps]
        labels += [steps_label(TEACHER, self.stage.recipe.evaluation.teacher_steps)] * (TEACHER in shown)
        save_picture(path.with_suffix(".png"), stack(list(shown.values()), labels))
        log_pictures(trainer, shown, done)

    def _log_table(
        self, trainer: L.Trainer, fixed: FixedSamples, cond: Cond, cells: Mapping[str, Sequence[Cell]], done: int
    ) -> None:
        if self.stage.recipe.log.table_samples:
            table = sample_table(fixed, cond, cells)
            log_table(trainer, "samples/table", table.columns, table.rows(done), done)
