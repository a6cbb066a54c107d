"""What a student is worth: every metric at each number of steps, beside the teacher's row and the real-against-real floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.distributed import rank, world_size
from flowmap.base.files import write_json
from flowmap.base.progress import Progress, Say
from flowmap.base.schema import RecipeError
from flowmap.build import BuiltTeacher, build_data, build_teacher
from flowmap.data import Dataset, Pairs
from flowmap.data.dataset import looked_at
from flowmap.flow.apportion import apportioned
from flowmap.flow.draws import RowGenerator, of_samples
from flowmap.flow.prior import Start, rows_told
from flowmap.flow.solver import Euler, invert
from flowmap.flow.types import Cond
from flowmap.known_rows import LOOK, Row, read_known, stamps, to_teacher
from flowmap.metrics import check_metrics, floors
from flowmap.recipe import Recipe, read_resolved
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.student.text import flow_alone
from flowmap.unseen import Draws, add_losses, coupled_draws, held_out_draws

REAL = ("inversion", "loss")  # what starts from real samples, not from noise


def evaluate(
    student: str | Path | Student,
    steps: Sequence[int] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    progress: Say | None = None,
    teacher: bool = True,
    anew: bool = False,
) -> dict[str, Any]:
    """The contents of metrics.json for a saved student, by its own recipe's data, teacher and metrics.

    steps: default the recipe's. metrics: only those kinds. The teacher's rows are left out where its weights are not on this machine, and
    without `teacher`. They and the floor are taken from the run's metrics.json where nothing that they depend on has changed; anew: never.
    """
    student = student if isinstance(student, Student) else load_student(student)
    if student.folder is None or not (student.folder / "recipe.yaml").is_file():
        raise ValueError("student: evaluate needs the recipe.yaml that lies beside the weights")
    recipe = flow_alone(read_resolved(student.folder / "recipe.yaml"), student.folder)
    chosen = _chosen(recipe, metrics)
    for k in steps or ():
        if k < 1:
            raise ValueError(f"steps: {k} must be 1 or more")
    data, built = build_data(recipe), None
    try:
        built = build_teacher(recipe, data) if teacher else None
    except RecipeError as error:
        if progress is not None:
            progress(f"no teacher's row: {error}")
    known = {} if anew else read_known(student.folder)
    options = dict(steps=steps, metrics=chosen, guidance=guidance, progress=progress, known=known)
    measured = measure(recipe, student, built, data, **options)
    if out is not None:
        write_json(Path(out), measured)
    return measured


def measure(
    recipe: Recipe,
    student: Student,
    teacher: BuiltTeacher | None,
    data: Dataset,
    *,
    steps: Sequence[int] | None = None,
    metrics: Sequence[Any] | None = None,
    guidance: float | None = None,
    progress: Say | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """metrics.json's contents. Every row starts from the same noise and classes; all processes call it and each draws its share.

    known: those of an earlier look, from which the teacher's rows and the floor are taken where their stamps are the same.
    """
    started = time.perf_counter()
    say = progress or (lambda message: None)
    specs = recipe.metrics if metrics is None else metrics
    check_metrics(specs, data, conditional=recipe.data.conditional, paired=isinstance(recipe.coupling, Pairs))
    rows = _Rows(recipe, student, teacher, data, specs, guidance, progress)
    stamp = stamps(recipe, student, teacher, data, specs, rows.first)
    same = {key for key in stamp if known and known.get("stamp", {}).get(key) == stamp[key]}
    result: dict[str, Any] = {"student": {}, "stamp": stamp}
    seconds: dict[str, float] = {}
    for k in steps or recipe.sampler.steps:
        rows.begin(f"student {k} step{'s' * (k > 1)}")
        result["student"][str(k)], seconds[f"student_{k}"] = rows.student(k, to_teacher(known, k) if "student" in same else None)
    nfe: dict[str, Any] = {"student": {str(k): recipe.sampler.calls(k) for k in steps or recipe.sampler.steps}}
    if "teacher" in same:
        say("teacher: as in metrics.json, from which nothing has changed")
        result |= {key: known[key] for key in ("teacher", "teacher_few") if key in known}
        nfe["teacher"], seconds["teacher"] = known["teacher"]["nfe"], known["seconds"]["teacher"]
    elif teacher is not None:
        n = recipe.evaluation.teacher_steps
        rows.begin(f"teacher {n} step{'s' * (n > 1)}")
        row, seconds["teacher"] = rows.teacher(n)
        nfe["teacher"] = n * teacher.calls_per_step
        result["teacher"] = {"nfe": nfe["teacher"], "steps": n, **row}
        if recipe.evaluation.teacher_extra_steps:
            rows.begin("teacher at few steps")
            result["teacher_few"] = {str(k): rows.teacher(k)[0] for k in recipe.evaluation.teacher_extra_steps}
    if not data.num_held_out:
        say("nothing is held out (data.held_out): distances are to the training samples alone, under keys that end in _train")
    if "floor" not in same:
        say("evaluating: real against real")
    result["floor"] = known["floor"] if "floor" in same else rows.floor(data)
    seconds |= {"decode": rows.decode_seconds} if rows.decode_seconds > 0 and any(spec.needs == "texts" for spec in specs) else {}
    seconds["evaluate"] = time.perf_counter() - started
    result["seconds"] = {key: round(value, 4) for key, value in seconds.items()}
    result["nfe"] = nfe
    if hasattr(data, "counts"):
        result["sentences"] = {"train": len(data), "held_out": len(data.held_out), **data.counts}
    return result


class _Rows:
    """One row of metrics.json: samples by some sampler, looked at by every metric."""

    def __init__(self, recipe: Recipe, student: Student, teacher: BuiltTeacher | None, data: Dataset, specs, guidance: float | None, say: Say | None):
        self.recipe, self.flow_map, self.specs, self.pictures = recipe, student.flow_map, specs, student.pictures
        self.say, self.label = say, ""
        self.draws = lambda of, num: of(recipe, student, data, num, guidance)
        self.built_teacher, self.guided = teacher, teacher and teacher.guided
        self.device, self.arrival = student.device, student.config.arrival
        world, mine = world_size(), rank()
        self.num = max((spec.images for spec in specs if spec.needs not in REAL), default=0) // world * world
        generator, fresh = (torch.Generator().manual_seed(recipe.evaluation.seed) for _ in range(2))
        # what this process's samples from `first` on draw on their way: those of mine, mine + world, ... among all
        self.noise = lambda first, count: of_samples(fresh, mine + world * torch.arange(first, first + count))
        self.start, self.sources = student.start(self.num, generator), data.wanted(self.num) if hasattr(data, "wanted") else None
        if hasattr(data, "starts"):
            x1, self.sources = data.starts(self.num)
            self.start = Start(x1)
        self.x1, self.world = self.start.x1[mine::world], world
        self.sentences, self.sources, self.decode_seconds = student.sentences, self.sources and self.sources[mine::world], 0.0
        self.places = torch.arange(self.num)[mine::world]
        self.classes = classes_by_law(data, recipe.evaluation.classes) if student.config.num_classes else None
        self.conditions = conditions_for(student, data, self.num, guidance, self.classes) if self.num else None
        real = {"conditions": lambda: (data.reference, data.reference_conditions), "texts": lambda: (data,)}
        self.built = [spec.compare(data) if spec.needs == "samples" else spec.build(*real.get(spec.needs, tuple)()) for spec in specs]
        self.known: dict[Any, Any] = {}  # what rows share: the many-step end points, straightness, inverted noise ... of student and teacher

    @property
    def first(self) -> tuple[Tensor, Cond]:
        """Where the first samples of every row start, and their conditions."""
        return self.start.x1[:LOOK], self.conditions(torch.arange(min(LOOK, self.num))) if self.num else {}

    def begin(self, row: str) -> None:
        """Names the row that is measured from here on."""
        self.label = f"evaluating: {row}"
        if self.say is not None:
            self.say(self.label)

    def floor(self, data: Dataset) -> dict[str, float]:
        found = floors(list(zip(self.specs, self.built, strict=True)), data, self.classes)
        for spec, metric in zip(self.specs, self.built, strict=True):
            found |= spec.floor(metric, data) if spec.needs == "texts" else {}
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
            self.known[whose, num, steps] = [solve(*batch, steps).cpu() for batch in self._batches(num, f" at {steps} steps")]
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
                metric.update(samples[:mine].cpu(), {key: value.cpu() for key, value in self.conditions(self.places[:mine]).items()})
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
            velocity, draws = self._velocity(whose), self.draws(held_out_draws, spec.images)
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
                cond = self.conditions(self.places[rows]) | rows_told(self.start, self.places[rows], self.device)
                yield self.x1[rows].to(self.device), cond, self.noise(i, rows.stop - i)
                count((rows.stop - i) * self.world)

    def _counting(self, num: int, what: str) -> Progress:
        """The progress of `num` samples in each process."""
        return Progress(num * self.world, f"{self.label}{what}", self.say)


def classes_by_law(data: Dataset, law: str = "data") -> Callable[[int], Tensor] | None:
    """What gives the classes (num,) of `num` samples: by the law of held-out samples, without any by that of training ones, -1 (no class)
    among them; uniform: as often each. None where the data has no classes."""
    labels = data.held_out_labels if data.num_held_out and data.held_out_labels is not None else data.labels
    if labels is None:
        return None
    counts = torch.bincount(labels + 1, minlength=data.num_classes + 1)
    if law == "uniform":
        counts = torch.ones(data.num_classes + 1, dtype=torch.int64).index_fill(0, torch.tensor(0), 0)
    return lambda num: apportioned(counts, num) - 1


def conditions_for(
    student: Student, data: Dataset, num: int, guidance: float | None = None, classes: Callable[[int], Tensor] | None = None
) -> Callable[[Tensor], Cond]:
    """What gives the conditions at some places of a set of `num` samples. Where there is text: those of held-out samples, without any of
    training ones, in an order drawn once. Else `classes`, and without these classes in turn. ValueError at once where the guidance scale
    does not fit."""
    if student.config.text is None and not student.config.descriptions:
        whole = student.conditions(num, None if classes is None else {"class": classes(num)}, guidance)
        return lambda places: {key: value[places.to(value.device)] for key, value in whole.items()}
    rows, asked = (data.num_held_out, data.held_out_conditions_at) if data.num_held_out else (len(data), data.conditions_at)

    def at(places: Tensor) -> Cond:
        return student.taken(len(places), asked(looked_at(places, rows)), guidance)

    at(torch.arange(1))
    return at


def _chosen(recipe: Recipe, kinds: Sequence[str] | None) -> list[Any]:
    from flowmap.base.schema import OWN_KINDS, kind_of, suggest
    from flowmap.kinds import TABLES, Metric

    if kinds is None:
        return list(recipe.metrics)
    for kind in kinds:
        if kind not in TABLES[Metric]:
            close = suggest(kind, TABLES[Metric])
            allowed = ", ".join(TABLES[Metric])
            raise ValueError(f"metrics: {kind!r} is not one of {allowed}{close or OWN_KINDS}")
    chosen: list[Any] = []
    for kind in kinds:
        chosen += [spec for spec in recipe.metrics if kind_of(spec, TABLES) == kind] or [TABLES[Metric][kind]()]
    return chosen
