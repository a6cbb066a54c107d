"""Rows of the COCO protocol (coco.py): samples drawn from captions, block by block, so that a row can be continued.

After each block the sums that figures are computed from are written to a file, at most every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.base.files import read_tensors, weights_hash, write_tensors
from flowmap.base.images import steps_label
from flowmap.base.precision import in_precision, wait_for
from flowmap.base.progress import LogFunction, Pace, Progress
from flowmap.evaluation.coco import Coco, beside, named, squared
from flowmap.evaluation.columns import LoadedTeacher
from flowmap.evaluation.samples import BATCH, recipe_of
from flowmap.flow.draws import of_samples
from flowmap.flow.prior import Start, conditioning_rows
from flowmap.flow.types import Cond
from flowmap.metrics.features import build_features
from flowmap.metrics.frechet import gaussian_frechet
from flowmap.metrics.picture_nets import transformers_source
from flowmap.metrics.real import metric_device
from flowmap.metrics.statistics import Moments, Statistics
from flowmap.nets.lora import fingerprint
from flowmap.student.student import Student

Draw = Callable[[Tensor, Cond, Tensor], Tensor]  # start points, conditions, places of the samples
PAUSE = 20.0  # seconds between two writes of the sums


@dataclass
class CocoRows:
    """Measures rows of one student. out: the file of the figures; the sums of unfinished rows are next to it."""

    student: Student
    coco: Coco
    reference: Statistics
    out: Path
    guidance: float | None = None
    seed: int = 0
    log: LogFunction | None = None
    _built: dict[str, Any] = field(default_factory=dict)
    _sums: list[Path] = field(default_factory=list)  # the files with the sums of these rows

    def __post_init__(self):
        recipe = recipe_of(self.student)
        self.precision = "32" if recipe is None else recipe.trainer.precision
        self.batch = BATCH if recipe is None else min(BATCH, recipe.evaluation.batch_size)
        self.captions = self.coco.captions()

    def measure(self, steps: Sequence[int], teacher: LoadedTeacher | None) -> dict[str, Any]:
        """The figures of the student at each number of steps, and of the teacher, as in metrics.json."""
        config = self.student.config
        seconds: dict[str, float] = {}
        nfe: dict[str, Any] = {"student": {str(k): config.sampler_at(k).calls(k) for k in steps}}
        found: dict[str, Any] = {"student": {}}
        for k in steps:
            found["student"][str(k)], seconds[f"student_{k}"] = self._row(
                steps_label("student", k), self._of_student(k)
            )
        if teacher is not None:
            row, seconds["teacher"] = self._row(teacher.label, self._of_teacher(teacher), *teacher.built.modules)
            nfe["teacher"] = teacher.built.calls(teacher.steps)
            found["teacher"] = {"nfe": nfe["teacher"], "steps": teacher.steps, **row}
        protocol = {**self.coco.stamp(), "seed": self.seed, "reference": self.reference.count}
        rounded = {key: round(value, 4) for key, value in seconds.items()}
        measured: dict[str, Any] = {"protocol": protocol, **found, "seconds": rounded, "nfe": nfe}
        return measured | self.student.quantized_json()

    def forget(self) -> None:
        """Remove the sums of the rows that were measured, once their figures are written."""
        for path in self._sums:
            path.unlink(missing_ok=True)

    def _of_student(self, k: int) -> tuple[Draw, float | None]:
        config = self.student.config
        sampler = config.sampler_at(k)

        def draw(x1: Tensor, cond: Cond, places: Tensor) -> Tensor:
            noise = of_samples(torch.Generator().manual_seed(self.seed), places) if sampler.draws else None
            return sampler(self.student.flow_map, x1, cond, steps=k, generator=noise)

        return draw, config.scale_at(k) if self.guidance is None else self.guidance

    def _of_teacher(self, teacher: LoadedTeacher) -> tuple[Draw, float | None]:
        return lambda x1, cond, places: teacher.built.solve(x1, cond, teacher.steps), self.guidance

    @torch.no_grad()
    def _row(
        self, label: str, drawn: tuple[Draw, float | None], *networks: nn.Module
    ) -> tuple[dict[str, float], float]:
        """(figures, seconds of drawing and decoding) of a row; a row that was begun before is continued.

        networks: those that draw, if they are not the student's.
        """
        draw, scale = drawn
        stamp = {**self._stamp(label, scale), "networks": [fingerprint(one) for one in networks]}
        sums = Sums(beside(self.out, f"{named(stamp)}.safetensors"), self._width, self._device)
        self._sums.append(sums.path)
        draw, pace = in_precision(draw, self.precision, self.student.device), Pace(PAUSE)
        with Progress(self.coco.images, f"{label}, COCO", self.log) as count:
            first = 0
            for start in self.student.start_blocks(self.coco.images, torch.Generator().manual_seed(self.seed)):
                size = len(start.x1)
                if first >= sums.count:
                    self._block(sums, start, first, draw, scale)
                    if pace.due() or first + size == self.coco.images:
                        sums.write()
                count(size)
                first += size
        return self._figures(sums), sums.seconds

    def _block(self, sums: Sums, start: Start, first: int, draw: Draw, scale: float | None) -> None:
        device = self.student.device
        for i in range(0, len(start.x1), self.batch):
            at = slice(i, min(i + self.batch, len(start.x1)))
            places = torch.arange(first + at.start, first + at.stop)
            texts = self.captions[first + at.start : first + at.stop]
            began = time.perf_counter()
            rows = self.student.conditions(len(texts), {"prompt": texts}, scale) | conditioning_rows(start, at, device)
            pictures = self.student.pictures(draw(start.x1[at].to(device), rows, places)).float()
            wait_for(device)
            sums.seconds += time.perf_counter() - began
            pictures = pictures.to(self._device)
            sums.moments.add(self._features(squared(pictures, self.coco.size)))
            if self.coco.clip is not None:
                self._clip.reset()
                self._clip.update(pictures, texts)
                sums.clip += float(self._clip.total)

    def _figures(self, sums: Sums) -> dict[str, float]:
        found = sums.moments.statistics()
        mine = (found.mean.cpu(), found.covariance.cpu(), self.reference.mean, self.reference.covariance)
        figures = {self.coco.key: float(gaussian_frechet(*mine))}
        if self.coco.clip_key is not None:
            figures[self.coco.clip_key] = max(0.0, 100 * sums.clip / sums.count)
        return figures

    def _stamp(self, label: str, scale: float | None) -> dict[str, Any]:
        """All that a row's samples and sums depend on."""
        config = self.student.config
        settings = [repr(config.sampler), repr(config.tuned), self.seed, scale, label, config.recipe_hash, config.step]
        settings += [self.student.quantized] if self.student.quantized else []
        return {**self.coco.stamp(), "weights": weights_hash(self.student.folder), "settings": settings}

    @property
    def _device(self) -> torch.device:
        return metric_device(self.student.device)

    @property
    def _width(self) -> int:
        return self.reference.width

    @property
    def _features(self) -> Any:
        if "features" not in self._built:
            weights = self.coco.weights
            self._built["features"] = build_features(self.coco.features, torch.empty(0), self._device, weights=weights)
        return self._built["features"]

    @property
    def _clip(self) -> Any:
        if "clip" not in self._built:
            from flowmap.metrics.clip_model import CLIPMean

            assert self.coco.clip is not None
            self._built["clip"] = CLIPMean(transformers_source("clip_score", self.coco.clip)).to(self._device)
        return self._built["clip"]


class Sums:
    """The sums of a row so far, kept in a file; a file of other sums, or a torn one, is begun anew."""

    def __init__(self, path: Path, width: int, device: torch.device):
        self.path, self.moments, self.clip, self.seconds = path, Moments(width, device), 0.0, 0.0
        kept = self._kept()
        if kept and kept["sum"].shape == (width,):
            self.moments.count = int(kept["numbers"][0])
            self.clip, self.seconds = float(kept["numbers"][1]), float(kept["numbers"][2])
            self.moments.sum, self.moments.outer = kept["sum"].to(device), kept["outer"].to(device)

    @property
    def count(self) -> int:
        return self.moments.count

    def write(self) -> None:
        numbers = torch.tensor([self.count, self.clip, self.seconds], dtype=torch.float64)
        sums = {"sum": self.moments.sum.cpu(), "outer": self.moments.outer.cpu()}
        write_tensors(self.path, {"numbers": numbers, **sums})

    def _kept(self) -> Mapping[str, Tensor]:
        try:
            return read_tensors(self.path)
        except (ValueError, OSError):
            return {}
