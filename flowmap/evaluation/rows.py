"""The rows of metrics.json: samples drawn by a sampler, measured by every metric of a recipe."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowmap.base.batches import rebatched
from flowmap.base.distributed import gathered
from flowmap.base.precision import in_precision, wait_for
from flowmap.base.progress import LogFunction
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.evaluation.held_out import Draws, Velocity, velocities
from flowmap.evaluation.known_rows import Row
from flowmap.evaluation.starts import Starts
from flowmap.flow.draws import RowGenerator
from flowmap.flow.solver import Euler, Solver, invert
from flowmap.flow.types import Cond
from flowmap.metrics import DrawnBatch, Spec, baselines
from flowmap.metrics.against import HasReferences
from flowmap.metrics.real import metric_device
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student
from flowmap.student.tuned import Tuned

Draw = Callable[[Tensor, Cond, RowGenerator], Tensor]
Solve = Callable[[Tensor, Cond, RowGenerator, int], Tensor]


@dataclass
class Flow:
    """A velocity field and its many-step solution, with what is computed once for all rows."""

    velocity: Velocity
    solve: Solve
    endpoints: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # by number of samples and steps
    inverted: dict[tuple[int, Solver], list[Draws]] = field(default_factory=dict)
    figures: dict[Spec, dict[str, float]] = field(default_factory=dict)

    def given(self, cond: Cond) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity as a function of (x, t)."""
        return lambda x, t: self.velocity(x, t, cond)

    @staticmethod
    def of_student(recipe: Recipe, student: Student) -> Flow:
        """The student's flow; a plain one, without an arrival time, is solved by Euler's method, not by its sampler."""
        flow_map = student.flow_map

        def by_sampler(x1: Tensor, cond: Cond, noise: RowGenerator, steps: int) -> Tensor:
            return recipe.sampler(flow_map, x1, cond, steps=steps, generator=noise)

        def by_euler(x1: Tensor, cond: Cond, noise: RowGenerator, steps: int) -> Tensor:
            return Euler(steps=steps)(lambda x, t: flow_map.velocity(x, t, cond), x1).x

        def velocity(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
            return flow_map.velocity(x, t, cond)

        return Flow(velocity, by_sampler if student.config.arrival else by_euler).at(recipe, student.device)

    @staticmethod
    def of_teacher(recipe: Recipe, teacher: BuiltTeacher, device: torch.device) -> Flow:
        def solve(x1: Tensor, cond: Cond, noise: RowGenerator, steps: int) -> Tensor:
            return teacher.solve(x1, cond, steps)

        return Flow(teacher.guided.velocity, solve).at(recipe, device)

    def at(self, recipe: Recipe, device: torch.device) -> Flow:
        """The same flow in the precision of the recipe's training."""
        velocity, solve = (in_precision(call, recipe.trainer.precision, device) for call in (self.velocity, self.solve))
        return replace(self, velocity=velocity, solve=solve)


class DrawnRow:
    """The samples that `draw` makes of the starts, and the flow behind them, in the form of `metrics.Drawn`.

    What metrics count is float32, on `device`. Of the samples a chunk is held at a time.
    """

    def __init__(
        self, starts: Starts, student: Student, draw: Draw, flow: Flow, coupled: dict[int, Draws], device: torch.device
    ):
        self.starts, self.student, self.draw, self.flow, self.device = starts, student, draw, flow, device
        self.world, self.sources = starts.world, starts.sources
        self.seconds = self.decode_seconds = 0.0
        self._coupled = coupled
        self._texts: list[str] = []
        self._pictures = in_precision(student.pictures, starts.recipe.trainer.precision, starts.device)

    def batches(self) -> Iterator[DrawnBatch]:
        """The samples of this process, drawn, decoded and passed on chunk by chunk; `seconds` are added up."""
        drawn = ({"x0": self.draw(*batch)} for batch in self.starts.batches(self.starts.num))
        chunks, first = iter(rebatched(drawn, self.starts.chunk)), 0
        while (samples := self._decoded(chunks)) is not None:
            self._write(samples[: max(0, self.starts.num_texts - first)])
            conditions = partial(self.starts.conditions_at, first, len(samples))
            captions = partial(self.starts.captions_at, first, len(samples))
            yield DrawnBatch(samples.to(self.device), first, self.world, conditions, captions)
            first += len(samples)

    def _decoded(self, chunks: Iterator[Mapping[str, Tensor]]) -> Tensor | None:
        """The next chunk of samples, on the student's device; None after the last."""
        started = time.perf_counter()
        chunk = next(chunks, None)
        found = None if chunk is None else self._pictures(chunk["x0"])
        wait_for(self.starts.device)
        self.seconds += time.perf_counter() - started
        return found.float() if found is not None and found.dtype == torch.bfloat16 else found

    def _write(self, samples: Tensor) -> None:
        """Decode samples to sentences."""
        if len(samples):
            started = time.perf_counter()
            self._texts += self.student.sentences(samples)
            self.decode_seconds += time.perf_counter() - started

    def texts(self, num: int) -> list[str]:
        parts = gathered(self._texts[: num // self.world])
        return [text for texts in zip(*parts, strict=True) for text in texts]

    def conditions(self, num: int) -> Cond:
        return self.starts.conditions(num)

    def paths(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        solver = Euler(steps=steps)
        for x1, cond, _ in self.starts.batches(num, " along the path"):
            path = solver(self.flow.given(cond), x1, keep=True).trajectory
            assert path is not None
            yield path.to(self.device), torch.tensor(solver.times())

    def endpoints(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        known = self.flow.endpoints
        if (num, steps) not in known:
            batches = self.starts.batches(num, f" at {steps} steps")
            known[num, steps] = [self.flow.solve(*batch, steps).cpu() for batch in batches]
        for batch, many in zip(self.starts.batches(num), known[num, steps], strict=True):
            yield self.draw(*batch).to(self.device), many.to(self.device)

    def inversions(self, num: int, solver: Solver) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if (num, solver) not in self.flow.inverted:
            self.flow.inverted[num, solver] = list(self._inverted(num, solver))
        done = 0
        for part in self.flow.inverted[num, solver]:
            back = self.draw(part.x1, part.cond, self.starts.noise(done, len(part.x0)))
            yield part.x0.to(self.device), part.x1.to(self.device), back.to(self.device)
            done += len(part.x0)

    def _inverted(self, num: int, solver: Solver) -> Iterator[Draws]:
        """Held-out samples, batch by batch, with the noise that the velocity carries them to in the place of x1."""
        draws = self.starts.held_out(num)
        with self.starts.counting(len(draws.x0), ", inverting") as count:
            for part in draws.batches(self.starts.recipe.evaluation.batch_size):
                yield replace(part, x1=invert(self.flow.given(part.cond), part.x0, solver).x)
                count(len(part.x0) * self.world)

    def velocities(self, num: int, times: Sequence[float]) -> Iterator[tuple[int, Tensor, Tensor]]:
        if num not in self._coupled:
            self._coupled[num] = self.starts.coupled(num)
        found = velocities(self.starts.recipe, self.flow.velocity, self._coupled[num], times)
        return ((place, mine.to(self.device), true.to(self.device)) for place, mine, true in found)


class Rows:
    """Measures rows of metrics.json by all metrics, each row from the same starts.

    references: the real samples that metrics compare with, by default those of the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Student,
        teacher: BuiltTeacher | None,
        data: Dataset,
        specs: Sequence[Spec],
        guidance: float | None,
        log: LogFunction | None,
        references: HasReferences | None = None,
    ):
        self.recipe, self._student = recipe, student
        self.guidance, self._starts = guidance, lambda scale: Starts(recipe, student, data, specs, scale, log)
        self.starts = self._starts(guidance)
        self.device = metric_device(student.device)
        self.built = [(spec, spec.build_on(references or data, self.device)) for spec in specs]
        self.decode_seconds = 0.0
        self._flow = Flow.of_student(recipe, student)
        self._teacher_flow = None if teacher is None else Flow.of_teacher(recipe, teacher, student.device)
        self._coupled: dict[int, Draws] = {}

    def tuned(self, settings: Tuned | None) -> Rows:
        """The same rows by other settings of the sampler: their scale is taken unless one was given."""
        if settings is None:
            return self
        rows, student = copy.copy(self), self._student
        rows.recipe = replace(self.recipe, sampler=settings.sampler(self.recipe.sampler))
        if settings.guidance is not None and self.guidance is None:
            rows.starts, rows._coupled = self._starts(settings.guidance), {}
            rows._flow = Flow.of_student(self.recipe, student)
            if self._teacher_flow is not None:
                rows._teacher_flow = replace(self._teacher_flow, endpoints={}, inverted={}, figures={})
        return rows

    def baseline(self, data: Dataset) -> dict[str, float]:
        return baselines(self.built, data, self.starts.classes)

    def student(self, k: int, to_teacher: Row | None = None) -> tuple[dict[str, float], float]:
        """The row at k steps and the seconds of drawing it. to_teacher: its distances to the teacher, if known."""

        def sampled(x1: Tensor, cond: Cond, noise: RowGenerator) -> Tensor:
            return self.recipe.sampler(self._student.flow_map, x1, cond, steps=k, generator=noise)

        draw = in_precision(sampled, self.recipe.trainer.precision, self.starts.device)
        row, seconds = self._row(draw, self._flow)
        if self._teacher_flow is not None:
            row |= to_teacher or self._to_teacher(draw, self._teacher_flow)
        return row, seconds

    def teacher(self, n: int) -> tuple[dict[str, float], float]:
        """The teacher's row at n steps and the seconds of drawing it."""
        flow = self._teacher_flow
        assert flow is not None, "this recipe has no teacher"
        return self._row(lambda x1, cond, noise: flow.solve(x1, cond, noise, n), flow)

    def _drawn(self, draw: Draw, flow: Flow) -> DrawnRow:
        return DrawnRow(self.starts, self._student, draw, flow, self._coupled, self.device)

    @torch.no_grad()
    def _row(self, draw: Draw, flow: Flow) -> tuple[dict[str, float], float]:
        row: dict[str, float] = {}
        drawn = self._drawn(draw, flow)
        for spec, metric in self.built:
            spec.begin(metric)
        for batch in drawn.batches():
            for spec, metric in self.built:
                spec.update(metric, batch)
        for spec, metric in sorted(self.built, key=_last):
            row |= self._figures(spec, metric, drawn)
        self.decode_seconds = drawn.decode_seconds
        return row, drawn.seconds

    def _figures(self, spec: Spec, metric: Any, drawn: DrawnRow) -> dict[str, float]:
        known = drawn.flow.figures
        if not spec.of_velocity:
            return spec.measure(metric, drawn)
        if spec not in known:
            known[spec] = spec.measure(metric, drawn)
        return known[spec]

    @torch.no_grad()
    def _to_teacher(self, draw: Draw, teacher: Flow) -> dict[str, float]:
        """The distances of the samples to the teacher's end points from the same noise."""
        drawn = self._drawn(draw, teacher)
        row: dict[str, float] = {}
        for spec, metric in self.built:
            row |= spec.measure(metric, drawn) if spec.of_endpoints else {}
        return {f"{key}_to_teacher": value for key, value in row.items()}


def _last(pair: tuple[Spec, Any]) -> bool:
    """Sorts distances to end points behind all other figures of a row."""
    return pair[0].of_endpoints
