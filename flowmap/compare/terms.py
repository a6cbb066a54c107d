"""The terms of a comparison: seconds of training or network evaluations, less what a recipe's preparations take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from flowmap.base.files import read_json
from flowmap.data import Pairs, TeacherSamples
from flowmap.estimate.calls import calls_of
from flowmap.plan.plan import Needed, Pairing, Sampling, Stage, plan, resolve
from flowmap.prepare.make_pairs import Maker
from flowmap.recipe import Recipe
from flowmap.train.clock import Clock
from flowmap.train.fit import device_of, fit, waiting_for
from flowmap.train.fit import make as make_on_disk

PAIRS = 256  # pairs in the batch that is timed


@dataclass(frozen=True)
class Terms:
    """The budget of each recipe and seed, in seconds of training or network evaluations, and the steps of evaluation.

    An evaluation is one network's forward pass for one sample; a backward pass counts as two, a tangent as one.
    """

    seconds: float | None
    evaluations: float | None
    steps: tuple[int, ...]

    def __post_init__(self):
        if (self.seconds is None) == (self.evaluations is None):
            raise ValueError("budget: give either --budget, seconds of training, or --calls, network evaluations")
        for key, value in (("budget", self.seconds), ("calls", self.evaluations)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key}: {value:g} must be above 0")
        if not self.steps or any(k < 1 for k in self.steps) or len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps: {list(self.steps)} must be different whole numbers from 1")

    def __str__(self) -> str:
        unit = "seconds of training" if self.seconds is not None else "network evaluations"
        return f"{self.budget:g} {unit}"

    @property
    def budget(self) -> float:
        """The seconds or the evaluations, whichever is given."""
        value = self.evaluations if self.seconds is None else self.seconds
        assert value is not None, "__post_init__ checks that one is given"
        return value


def evaluations_of(recipe: Recipe) -> float:
    """Network evaluations of one optimizer step, in the mean of a run, with the teacher's calls."""
    calls = calls_of(recipe, conditional=recipe.data.conditional)
    return samples_of(recipe) * (calls.forward + 2 * calls.backward + calls.strong + calls.weak)


def samples_of(recipe: Recipe) -> int:
    return recipe.batches.samples


def shared_folders(entrants: Sequence[Recipe]) -> set[Path]:
    """The folders of the recipes' teachers, their samples, autoencoders, and what those need: they are not counted."""
    found: set[Path] = set()
    for entrant in entrants:
        run, coupling = resolve(entrant), entrant.coupling
        by_teacher = run.pairs_teachers if isinstance(coupling, Pairs) and coupling.recipe is None else []
        for needed in (*run.autoencoders, *run.teachers, *by_teacher):
            found |= {stage.folder for stage in needed.stages}
        found |= {Sampling(run.sampled).folder} if isinstance(entrant.data, TeacherSamples) else set()
    return found


def own_stages(recipe: Recipe, shared: Set[Path]) -> list[Stage | Pairing]:
    """What this recipe alone needs, in order: pairs, runs that it starts from. They count for its budget."""
    return [stage for stage in needs_of(recipe) if isinstance(stage, (Stage, Pairing)) and stage.folder not in shared]


def needs_of(recipe: Recipe) -> list[Needed]:
    return plan(recipe, Path(recipe.name))[:-1]


def make(stage: Needed, log, now: Callable[[], float]) -> None:
    """Make a stage that is not complete; metrics.json has the time of a run."""
    if isinstance(stage, Stage):
        fit(stage.recipe, stage.folder, resume=True, log=log, clock=Clock(now=now), shared=True)
    else:
        make_on_disk(stage, log, waiting_for(stage.recipe.name, stage.folder, log))


def price_of(stage: Stage | Pairing, terms: Terms, now: Callable[[], float]) -> float:
    """What a stage takes, in the unit of the terms: an estimate for pairs, the measured figure for a finished run.

    The seconds of pairs are those of one batch times the number of batches, whoever makes them.
    """
    if isinstance(stage, Stage):
        if terms.evaluations is not None:
            return stage.recipe.trainer.steps * evaluations_of(stage.recipe)
        metrics = read_json(stage.folder / "metrics.json")
        return float(metrics["training"]["seconds"] if "training" in metrics else metrics["seconds"]["train"])
    maker = Maker.of(stage.run, device_of(stage.recipe))
    batch = maker.ranges()[0][:PAIRS]
    _, calls = maker.columns(batch[:1])
    if terms.evaluations is not None:
        return maker.spec.num * calls
    started = now()
    maker.columns(batch)
    return (now() - started) * maker.spec.num / len(batch)


def left_of(terms: Terms, spent: float) -> Terms:
    """The terms less what a recipe's own preparations took; raises NothingLeft if they took everything."""
    if terms.budget <= spent:
        raise NothingLeft(f"what it needs for itself takes {spent:.4g} of {terms}")
    rest = lambda value: None if value is None else value - spent
    return replace(terms, seconds=rest(terms.seconds), evaluations=rest(terms.evaluations))


class NothingLeft(Exception):
    """A recipe's own preparations take its whole budget."""
