"""The rows of metrics.json: samples drawn by a sampler, measured by every metric of a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowmap.base.progress import LogFunction
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.evaluation.held_out import Draws, Velocity, velocities
from flowmap.evaluation.known_rows import Row
from flowmap.evaluation.starts import Starts
from flowmap.flow.draws import RowGenerator
from flowmap.flow.solver import Euler, Solver, invert
from flowmap.flow.types import Cond
from flowmap.metrics import Spec, baselines
from flowmap.recipe.recipe import Recipe
from flowmap.student.student import Student

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

        return Flow(
            lambda x, t, cond: flow_map.velocity(x, t, cond), by_sampler if student.config.arrival else by_euler
        )

    @staticmethod
    def of_teacher(teacher: BuiltTeacher) -> Flow:
        return Flow(teacher.guided.velocity, lambda x1, cond, noise, steps: teacher.solve(x1, cond, steps))


class DrawnRow:
    """The samples that `draw` makes of the starts, and the flow behind them, in the form of `metrics.Drawn`."""

    def __init__(self, starts: Starts, student: Student, draw: Draw, flow: Flow, coupled: dict[int, Draws]):
        self.starts, self.student, self.draw, self.flow = starts, student, draw, flow
        self.world, self.sources = starts.world, starts.sources
        self.decode_seconds = 0.0
        self._coupled = coupled

    @cached_property
    def pictures(self) -> Tensor:
        """All samples of this process, decoded, on the student's device."""
        if not self.starts.num:
            return self.starts.x1
        batches = self.starts.batches(self.starts.num)
        return self.student.pictures(torch.cat([self.draw(*batch) for batch in batches]))

    @cached_property
    def sentences(self) -> list[str]:
        """As many sentences as the metrics need, decoded when one of them asks."""
        started = time.perf_counter()
        found = self.student.sentences(self.pictures[: self.starts.num_texts])
        self.decode_seconds = time.perf_counter() - started
        return found

    def samples(self, num: int) -> Tensor:
        return self.pictures[: num // self.world].cpu()

    def texts(self, num: int) -> list[str]:
        return self.sentences[: num // self.world]

    def conditions(self, num: int) -> Cond:
        return self.starts.conditions(num)

    def paths(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        solver = Euler(steps=steps)
        for x1, cond, _ in self.starts.batches(num, " along the path"):
            path = solver(self.flow.given(cond), x1, keep=True).trajectory
            assert path is not None
            yield path.cpu(), torch.tensor(solver.times())

    def endpoints(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        known = self.flow.endpoints
        if (num, steps) not in known:
            batches = self.starts.batches(num, f" at {steps} steps")
            known[num, steps] = [self.flow.solve(*batch, steps).cpu() for batch in batches]
        for batch, many in zip(self.starts.batches(num), known[num, steps], strict=True):
            yield self.draw(*batch).cpu(), many

    def inversions(self, num: int, solver: Solver) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if (num, solver) not in self.flow.inverted:
            self.flow.inverted[num, solver] = list(self._inverted(num, solver))
        done = 0
        for part in self.flow.inverted[num, solver]:
            back = self.draw(part.x1, part.cond, self.starts.noise(done, len(part.x0)))
            yield part.x0.cpu(), part.x1.cpu(), back.cpu()
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
        return velocities(self.starts.recipe, self.flow.velocity, self._coupled[num], times)


class Rows:
    """Measures rows of metrics.json by all metrics, each row from the same starts."""

    def __init__(
        self,
        recipe: Recipe,
        student: Student,
        teacher: BuiltTeacher | None,
        data: Dataset,
        specs: Sequence[Spec],
        guidance: float | None,
        log: LogFunction | None,
    ):
        self.recipe, self._student, self._teacher = recipe, student, teacher
        self.starts = Starts(recipe, student, data, specs, guidance, log)
        self.built = [(spec, spec.build_on(data)) for spec in specs]
        self.decode_seconds = 0.0
        self._flow = Flow.of_student(recipe, student)
        self._teacher_flow = None if teacher is None else Flow.of_teacher(teacher)
        self._coupled: dict[int, Draws] = {}

    def baseline(self, data: Dataset) -> dict[str, float]:
        return baselines(self.built, data, self.starts.classes)

    def student(self, k: int, to_teacher: Row | None = None) -> tuple[dict[str, float], float]:
        """The row at k steps and the seconds of drawing it. to_teacher: its distances to the teacher, if known."""

        def draw(x1: Tensor, cond: Cond, noise: RowGenerator) -> Tensor:
            return self.recipe.sampler(self._student.flow_map, x1, cond, steps=k, generator=noise)

        row, seconds = self._row(draw, self._flow)
        if self._teacher_flow is not None:
            row |= to_teacher or self._to_teacher(draw, self._teacher_flow)
        return row, seconds

    def teacher(self, n: int) -> tuple[dict[str, float], float]:
        """The teacher's row at n steps and the seconds of drawing it."""
        assert self._teacher is not None and self._teacher_flow is not None, "this recipe has no teacher"
        teacher = self._teacher
        return self._row(lambda x1, cond, noise: teacher.solve(x1, cond, n), self._teacher_flow)

    @torch.no_grad()
    def _row(self, draw: Draw, flow: Flow) -> tuple[dict[str, float], float]:
        row: dict[str, float] = {}
        drawn = DrawnRow(self.starts, self._student, draw, flow, self._coupled)
        started = time.perf_counter()
        _ = drawn.pictures  # drawn here, so that the time is that of sampling
        seconds = time.perf_counter() - started
        for spec, metric in sorted(self.built, key=_last):
            row |= self._figures(spec, metric, drawn)
        self.decode_seconds = drawn.decode_seconds
        return row, seconds

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
        drawn = DrawnRow(self.starts, self._student, draw, teacher, self._coupled)
        row: dict[str, float] = {}
        for spec, metric in self.built:
            row |= spec.measure(metric, drawn) if spec.of_endpoints else {}
        return {f"{key}_to_teacher": value for key, value in row.items()}


def _last(pair: tuple[Spec, Any]) -> bool:
    """Sorts distances to end points behind all other figures of a row."""
    return pair[0].of_endpoints
