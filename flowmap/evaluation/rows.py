"""The rows of metrics.json: samples drawn by a sampler, measured by every metric of a recipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowmap.base.distributed import rank, world_size
from flowmap.base.progress import LogFunction, Progress
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.evaluation.conditions import classes_by_law, conditions_for
from flowmap.evaluation.held_out import Draws, add_losses, coupled_draws, held_out_samples
from flowmap.evaluation.known_rows import LOOK, Row
from flowmap.flow.draws import RowGenerator, of_samples
from flowmap.flow.prior import Start, conditioning_rows
from flowmap.flow.solver import Euler, invert
from flowmap.flow.types import Cond
from flowmap.metrics import baselines
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student

REAL = ("inversion", "loss")  # what starts from real samples, not from noise


class Rows:
    """One row of metrics.json: samples by some sampler, looked at by every metric."""

    def __init__(
        self,
        recipe: Recipe,
        student: Student,
        teacher: BuiltTeacher | None,
        data: Dataset,
        specs,
        guidance: float | None,
        log: LogFunction | None,
    ):
        self.recipe, self.flow_map, self.specs, self.pictures = recipe, student.flow_map, specs, student.pictures
        self.log, self.label = log, ""
        self.draws = lambda of, num: of(recipe, student, data, num, guidance)
        self.built_teacher, self.guided = teacher, teacher and teacher.guided
        self.device, self.arrival = student.device, student.config.arrival
        world, mine = world_size(), rank()
        self.num = max((spec.images for spec in specs if spec.needs not in REAL), default=0) // world * world
        generator, fresh = (torch.Generator().manual_seed(recipe.evaluation.seed) for _ in range(2))
        # what this process's samples from `first` on draw on their way: those of mine, mine + world, ... among all
        self.noise = lambda first, count: of_samples(fresh, mine + world * torch.arange(first, first + count))
        self.start, self.sources = (
            student.start(self.num, generator),
            data.wanted(self.num) if hasattr(data, "wanted") else None,
        )
        if hasattr(data, "starts"):
            x1, self.sources = data.starts(self.num)
            self.start = Start(x1)
        self.x1, self.world = self.start.x1[mine::world], world
        self.sentences, self.sources, self.decode_seconds = (
            student.sentences,
            self.sources and self.sources[mine::world],
            0.0,
        )
        self.places = torch.arange(self.num)[mine::world]
        self.classes = classes_by_law(data, recipe.evaluation.classes) if student.config.num_classes else None
        self.conditions = conditions_for(student, data, self.num, guidance, self.classes) if self.num else None
        real = {"conditions": lambda: (data.reference, data.reference_conditions), "texts": lambda: (data,)}
        self.built = [
            spec.compare(data) if spec.needs == "samples" else spec.build(*real.get(spec.needs, tuple)())
            for spec in specs
        ]
        self.known: dict[
            Any, Any
        ] = {}  # what rows share: the many-step end points, straightness, inverted noise ... of student and teacher

    @property
    def first(self) -> tuple[Tensor, Cond]:
        """Where the first samples of every row start, and their conditions."""
        return self.start.x1[:LOOK], self.conditions(torch.arange(min(LOOK, self.num))) if self.num else {}

    def begin(self, row: str) -> None:
        """Names the row that is measured from here on."""
        self.label = f"evaluating: {row}"
        if self.log is not None:
            self.log(self.label)

    def baseline(self, data: Dataset) -> dict[str, float]:
        found = baselines(list(zip(self.specs, self.built, strict=True)), data, self.classes)
        for spec, metric in zip(self.specs, self.built, strict=True):
            found |= spec.baseline(metric, data) if spec.needs == "texts" else {}
        return found

    def student(self, k: int, to_teacher: Row | None = None) -> tuple[dict[str, float], float]:
        """The row at k steps; to_teacher: its distances to the teacher, where they are known."""

        def draw(x1: Tensor, cond, noise: RowGenerator) -> Tensor:
            return self.recipe.sampler(self.flow_map, x1, cond, steps=k, generator=noise)

        row, seconds = self._row(draw, "student")
        if self.guided is not None:
            row |= to_teacher or {f"{key}_to_teacher": value for key, value in self._endpoints(draw, "teacher").items()}
        return row, seconds

    def teacher(self, n: int) -> tuple[dict[str, float], float]:
        return self._row(lambda x1, cond, noise: self.built_teacher.solve(x1, cond, n), "teacher")

    def _map(self, x1: Tensor, cond, noise: RowGenerator, steps: int) -> Tensor:
        return self.recipe.sampler(self.flow_map, x1, cond, steps=steps, generator=noise)

    def _euler(self, x1: Tensor, cond, noise: RowGenerator, steps: int) -> Tensor:
        return Euler(steps=steps)(lambda x, t: self.flow_map.velocity(x, t, cond), x1).x

    def _velocity(self, whose: str):
        return (self.guided if whose == "teacher" else self.flow_map).velocity

    def _many(self, whose: str, num: int, steps: int) -> list[Tensor]:
        """End points of `steps` steps, batch by batch: of a plain flow those of Euler's, whatever rule draws its few-step samples."""
        if (whose, num, steps) not in self.known:
            of_teacher = lambda x1, cond, noise, steps: self.built_teacher.solve(x1, cond, steps)
            solve = of_teacher if whose == "teacher" else self._map if self.arrival else self._euler
            self.known[whose, num, steps] = [
                solve(*batch, steps).cpu() for batch in self._batches(num, f" at {steps} steps")
            ]
        return self.known[whose, num, steps]

    @torch.no_grad()
    def _row(self, draw, whose: str) -> tuple[dict[str, float], float]:
        row: dict[str, float] = {}
        started = time.perf_counter()
        samples = self.pictures(torch.cat([draw(*batch) for batch in self._batches(self.num)])) if self.num else self.x1
        seconds = time.perf_counter() - started
        looked = max((spec.images for spec in self.specs if spec.needs == "texts"), default=0)
        began, texts = time.perf_counter(), self.sentences(samples[: looked // self.world]) if looked else []
        self.decode_seconds = time.perf_counter() - began
        for spec, metric in zip(self.specs, self.built, strict=True):
            if spec.needs == "samples":
                metric.reset()
                metric.update(samples[: spec.images // self.world].cpu(), world=self.world)
                row |= metric.report()
            elif spec.needs == "texts":
                mine = spec.images // self.world
                row |= spec.report(metric, texts[:mine], self.conditions(self.places[:mine]), self.sources)
            elif spec.needs == "conditions":
                metric.reset()
                mine = spec.images // self.world
                metric.update(
                    samples[:mine].cpu(),
                    {key: value.cpu() for key, value in self.conditions(self.places[:mine]).items()},
                )
                row |= spec.report(metric)
            elif spec.needs == "trajectory":
                row |= self._straightness(spec, metric, whose)
            elif spec.needs == "inversion":
                row |= self._inversion(spec, metric, draw, whose)
            elif spec.needs == "loss":
                row |= self._loss(spec, metric, whose)
        return row | self._endpoints(draw, whose), seconds

    @torch.no_grad()
    def _straightness(self, spec, metric, whose: str) -> dict[str, float]:
        if (whose, spec) in self.known:
            return self.known[whose, spec]
        metric.reset()
        solver, velocity = Euler(steps=spec.steps), self._velocity(whose)
        for x1, cond, _ in self._batches(spec.images, " along the path"):
            path = solver(lambda x, t, cond=cond: velocity(x, t, cond), x1, keep=True).trajectory
            metric.update(path.cpu(), torch.tensor(solver.times()))
        self.known[whose, spec] = spec.report(metric)
        return self.known[whose, spec]

    @torch.no_grad()
    def _inversion(self, spec, metric, draw, whose: str) -> dict[str, float]:
        metric.reset()
        done = 0
        for part in self._inverted(spec, whose):
            metric.update(part.x0.cpu(), part.x1.cpu(), draw(part.x1, part.cond, self.noise(done, len(part.x0))).cpu())
            done += len(part.x0)
        return spec.report(metric)

    def _inverted(self, spec, whose: str) -> list[Draws]:
        """Held-out samples, batch by batch, with the noise that the velocity carries them to in place of that drawn."""
        if (whose, spec) not in self.known:
            velocity, draws = self._velocity(whose), self.draws(held_out_samples, spec.images)
            noise = lambda part: invert(lambda x, t: velocity(x, t, part.cond), part.x0, spec.solver).x
            parts = self.known[whose, spec] = []
            with self._counting(len(draws.x0), ", inverting") as count:
                for part in draws.batches(self.recipe.evaluation.batch_size):
                    parts.append(replace(part, x1=noise(part)))
                    count(len(part.x0) * self.world)
        return self.known[whose, spec]

    @torch.no_grad()
    def _loss(self, spec, metric, whose: str) -> dict[str, float]:
        if (whose, spec) in self.known:
            return self.known[whose, spec]
        if spec not in self.known:
            self.known[spec] = self.draws(coupled_draws, spec.images)
        metric.reset()
        add_losses(metric, self.recipe, self._velocity(whose), self.known[spec])
        self.known[whose, spec] = spec.report(metric)
        return self.known[whose, spec]

    @torch.no_grad()
    def _endpoints(self, draw, whose: str) -> dict[str, float]:
        row: dict[str, float] = {}
        for spec, metric in zip(self.specs, self.built, strict=True):
            if spec.needs != "endpoints":
                continue
            metric.reset()
            for batch, many in zip(self._batches(spec.images), self._many(whose, spec.images, spec.steps), strict=True):
                metric.update(draw(*batch).cpu(), many)
            row |= spec.report(metric)
        return row

    def _batches(self, num: int, what: str = "") -> Iterator[tuple[Tensor, dict[str, Tensor], RowGenerator]]:
        """This process's share of the first `num` starts; a batch is counted as done when the next one is asked for."""
        size, num = self.recipe.evaluation.batch_size, num // self.world
        with self._counting(num, what) as count:
            for i in range(0, num, size):
                rows = slice(i, min(i + size, num))
                cond = self.conditions(self.places[rows]) | conditioning_rows(
                    self.start, self.places[rows], self.device
                )
                yield self.x1[rows].to(self.device), cond, self.noise(i, rows.stop - i)
                count((rows.stop - i) * self.world)

    def _counting(self, num: int, what: str) -> Progress:
        """The progress of `num` samples in each process."""
        return Progress(num * self.world, f"{self.label}{what}", self.log)
