"""One recipe at one seed: its length, its training and the figures of its student, written to result.json."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flowmap.base.files import read_json, write_json
from flowmap.base.progress import LogFunction, paced
from flowmap.base.schema import RecipeError, short_hash, to_plain
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.compare.entrants import from_its_start, of_length, start_of
from flowmap.compare.terms import (
    NothingLeft,
    Terms,
    evaluations_of,
    left_of,
    make,
    needs_of,
    own_stages,
    price_of,
    samples_of,
)
from flowmap.evaluation.measure import measure
from flowmap.flow.types import Objective
from flowmap.plan.plan import Pairing, Stage, resolve
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.train.callbacks import peak_gib
from flowmap.train.clock import SETTLING, Clock
from flowmap.train.finite import NotFinite
from flowmap.train.fit import FitError, device_of, fit, silent

TRIAL = 0.05  # the share of the budget, in addition to it, for measuring the time of a step
TRIAL_SECONDS = 20.0  # at most
TRIAL_STEPS = SETTLING + 5  # at least
FOREVER = 10**9


@dataclass(frozen=True)
class EvalSpec:
    """The metrics and the evaluation of all students: those of the comparison's first recipe."""

    metrics: tuple[Any, ...]
    recipe: Recipe

    @staticmethod
    def of(first: Recipe) -> EvalSpec:
        metrics = tuple(spec for spec in first.metrics if spec.on_samples)
        if not metrics:
            raise RecipeError(
                f"{first.name}: metrics: has none of samples (frechet, precision_recall), "
                "by which students are compared"
            )
        return EvalSpec(metrics, first)

    def at(self, recipe: Recipe) -> Recipe:
        return recipe.changed(metrics=self.metrics, evaluation=self.recipe.evaluation)

    @cached_property
    def hash(self) -> str:
        return short_hash(
            [to_plain(self.metrics, TABLES, hashed=True), to_plain(self.recipe.evaluation, TABLES, hashed=True)]
        )


@dataclass(frozen=True)
class Entry:
    """A recipe at a seed, the folder of its run, and the folders that are not counted for it (`shared`)."""

    recipe: Recipe
    folder: Path
    terms: Terms
    look: EvalSpec
    shared: frozenset[Path]
    now: Callable[[], float]

    @cached_property
    def same(self) -> str:
        """A hash of everything that changes the training: the settings and the terms."""
        return short_hash([self.recipe.hash(), self.terms.seconds, self.terms.evaluations])

    def found(self) -> dict[str, Any] | None:
        """The finished result, None if there is none; raises RecipeError if it is of other settings or terms."""
        path = self.folder / "result.json"
        if not path.is_file():
            return None
        result = read_json(path)
        if result.get("same") != self.same:
            raise RecipeError(
                f"--out: {self.folder} holds {self.recipe.name!r} with other settings or on other terms; "
                "choose another --out"
            )
        return result

    def kept(self, log: LogFunction) -> dict[str, Any] | None:
        """The finished result, measured again or completed if other figures are asked for; None if there is none."""
        result = self.found()
        if result is None or result["ended"] not in ("whole", "cut"):
            return result
        figures = result["figures"] if result["look"] == self.look.hash else {}
        if missing := [k for k in self.steps() if str(k) not in figures]:
            try:
                result |= {"figures": figures | self.figures(missing, log), "look": self.look.hash}
            except NotFinite as error:
                result |= {"ended": "diverged", "why": str(error), "figures": {}}
            self._keep(result)
        return result

    def run(self, log: LogFunction) -> dict[str, Any]:
        """Train and measure, then write and return the result; a run that diverges, or has no time left, is one."""
        result = {"recipe": self.recipe.name, "seed": self.recipe.seed, "same": self.same, "look": self.look.hash}
        trained, clock = {"seconds": 0.0, "steps": 0, "peak_gib": 0.0}, Clock(now=self.now)
        try:
            plan = self.planned(log)
            result |= plan
            log(f"seed {self.recipe.seed}, {self.recipe.name}: {plan['planned_steps']} steps in {self.terms}")
            clock = Clock(
                math.inf if self.terms.seconds is None else self.terms.seconds - plan["own_seconds"], self.now
            )
            forget_peak()
            recipe = self.bare(plan["planned_steps"])
            done = fit(recipe, self.folder, resume=True, log=self._paced(log), clock=clock)
            trained = done.metrics["training"]
            ended = "cut" if trained["steps"] < plan["planned_steps"] else "whole"
            end = {"ended": ended, "figures": self.figures(self.steps(), log)}
        except NothingLeft as error:
            end = {"ended": "no time", "why": str(error), "figures": {}}
        except NotFinite as error:
            end = {"ended": "diverged", "why": str(error), "figures": {}}
        except FitError as error:
            if not isinstance(error.__cause__, NotFinite):
                raise
            end = {"ended": "diverged", "why": str(error.__cause__), "figures": {}}
            trained |= {
                "seconds": round(clock.seconds, 4),
                "steps": clock.steps,
                "peak_gib": peak_gib(torch.device(device_of(self.recipe))),
            }
        result |= {"train_seconds": trained["seconds"], "steps": trained["steps"], "peak_gib": trained["peak_gib"]}
        result |= {
            "images": trained["steps"] * samples_of(self.recipe),
            "evaluations": trained["steps"] * evaluations_of(self.recipe),
            **end,
        }
        self._keep(result)
        return result

    def _paced(self, log: LogFunction) -> LogFunction:
        """A log function with the seed and the name, for at most one line of progress in 10 seconds."""
        return paced(lambda line: log(f"seed {self.recipe.seed}, {self.recipe.name}: {line}"))

    def _keep(self, result: Mapping[str, Any]) -> None:
        write_json(self.folder / "result.json", result)

    def planned(self, log: LogFunction) -> dict[str, Any]:
        """The number of steps that fit into the terms, with what the preparations took.

        It is computed once and kept in length.json, so that an interrupted run continues with it.
        """
        path = self.folder / "length.json"
        if path.is_file() and (plan := read_json(path)).get("same") == self.same:
            return {key: value for key, value in plan.items() if key != "same"}
        spent = self._prepared(log)
        left = left_of(self.terms, spent)
        if left.seconds is None:
            steps = int(left.budget / evaluations_of(self.recipe))
            plan = {"planned_steps": steps, "own_evaluations": spent, "own_seconds": 0.0}
        else:
            seconds = self.step_seconds(left.seconds)
            steps = int(left.seconds / seconds * (1 + 1e-9))
            plan = {"planned_steps": steps, "own_seconds": spent, "step_seconds": seconds}
        if plan["planned_steps"] < 1:
            raise NothingLeft(f"not one step fits into what is left of {self.terms}")
        write_json(path, {"same": self.same, **plan})
        return plan

    def _prepared(self, log: LogFunction) -> float:
        """Make what the recipe needs; returns what its own part of that takes.

        Raises NothingLeft before pairs are made that exceed the budget.
        """
        spent, own = 0.0, {stage.folder for stage in own_stages(self.recipe, self.shared)}
        for stage in needs_of(self.recipe):
            if stage.folder in own and isinstance(stage, Pairing):
                spent += price_of(stage, self.terms, self.now)
                left_of(self.terms, spent)
            if not stage.complete:
                make(stage, log, self.now)
            if stage.folder in own and isinstance(stage, Stage):
                spent += price_of(stage, self.terms, self.now)
        return spent

    def step_seconds(self, budget: float) -> float:
        """The mean time of a step over short trial runs, which are thrown away: one before the `start` of the
        objective, if it has one, and one after it.
        """
        early = min(start_of(self.recipe.objective) / self.recipe.trainer.steps, 1.0)
        late = 0.0 if early == 1 else self._tried(from_its_start(self.recipe).objective, budget)
        return late if early == 0 else early * self._tried(self.recipe.objective, budget) + (1 - early) * late

    def _tried(self, objective: Objective, budget: float) -> float:
        clock = Clock(min(TRIAL * budget, TRIAL_SECONDS), self.now, at_least=TRIAL_STEPS)
        recipe = self.bare(FOREVER).changed(objective=objective, optimizer=self.recipe.optimizer)
        with tempfile.TemporaryDirectory() as scratch:
            fit(recipe, Path(scratch) / "run", log=silent, clock=clock)
        return clock.step_seconds

    def bare(self, steps: int) -> Recipe:
        """The recipe at that length without metrics, pictures and W&B: compare measures by itself."""
        log = replace(self.recipe.log, wandb=False, samples_every_steps=0, metrics_every_steps=0)
        return replace(of_length(self.recipe, steps), metrics=(), log=log)

    def steps(self) -> tuple[int, ...]:
        """The steps at which this student is measured: 1 alone if its sampler is for one step."""
        return tuple(k for k in self.terms.steps if k == 1 or tuple(self.recipe.sampler.steps) != (1,))

    def figures(self, steps: Sequence[int], log: LogFunction) -> dict[str, dict[str, float]]:
        """The figures of the run's student at each number of steps; raises NotFinite if one is not finite."""
        if not steps:
            return {}
        recipe = self.look.at(self.recipe)
        student = load_student(self.folder / "student").to(device_of(recipe))
        data = build_data(resolve(recipe))
        found = measure(recipe, student, None, data, steps=steps, progress=self._paced(log))["student"]
        if any(not math.isfinite(value) for row in found.values() for value in row.values()):
            raise NotFinite("its samples are not finite")
        return found


def baseline_rows(entry: Entry, log: LogFunction | None = None) -> dict[str, Any]:
    """The teacher's rows and the baseline, by the entry's teacher and metrics, under the keys of metrics.json."""
    recipe, terms = entry.look.at(entry.recipe), entry.terms
    recipe = recipe.changed(evaluation=replace(recipe.evaluation, teacher_extra_steps=terms.steps))
    run = resolve(recipe)
    data = build_data(run)
    teacher = build_teacher(run, data)
    config = student_config(run, data, teacher)
    student = Student(config, build_student(run, config, teacher).eval()).to(device_of(recipe))
    if teacher is not None:
        teacher.to(device_of(recipe))
    found = measure(recipe, student, teacher, data, steps=[1], progress=log)
    return {key: found[key] for key in ("teacher", "teacher_few", "floor", "data") if key in found}


def forget_peak() -> None:
    """Reset the peak of memory, if the system can do that."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
