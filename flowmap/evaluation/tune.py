"""Search of the settings of a trained student for each number of steps: guidance scale, gamma and time grid.

Candidates are compared by one distance, on generated samples from the search's own noise against one half of the
held-out samples. What is found is measured once more, from the noise of evaluation against the other half, so that the
figure that is reported is not the one that was selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import read_json, write_json
from flowmap.base.progress import LogFunction
from flowmap.build.data import build_data
from flowmap.build.text import flow_alone
from flowmap.data import Dataset
from flowmap.evaluation.rows import Rows
from flowmap.flow.types import Cond
from flowmap.metrics import MMD, Frechet
from flowmap.metrics.against import TRAIN, HasReferences
from flowmap.metrics.real import Rows as Samples
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.samplers import Gamma
from flowmap.student.config_file import read_config
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.student.tuned import Tuned, can_be_tuned, tuned_json

GAMMAS = (0.0, 0.3, 0.6, 0.9)
SHIFTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of even grids
NUM_SCALES = 5  # even in the range that the student was trained on
ROUNDS = 2  # over the three settings

Alternatives = Callable[[Tuned], list[list[Tuned]]]  # settings that differ in the scale, in gamma and in the grid


@dataclass(frozen=True)
class Found:
    """The best settings for a number of steps, with the distances (search, check) before and after."""

    best: Tuned
    before: tuple[float, float]
    after: tuple[float, float]

    @property
    def better(self) -> bool:
        """Whether the check, which took no part in the selection, is better too."""
        return self.after[1] < self.before[1]


class Half:
    """A data set of which every other held-out sample is held out, from the first or the second on."""

    def __init__(self, data: Dataset, first: int):
        self.data = data
        self.reference, self.reference_labels = data.reference, data.reference_labels
        self.held_out: Samples = EveryOther(data.held_out, first)
        labels = data.held_out_labels
        self.held_out_labels = None if labels is None else labels[first::2]
        self.places = torch.arange(data.num_held_out)[first::2]

    def reference_conditions_at(self, places: Tensor) -> Cond:
        return self.data.reference_conditions_at(places)

    def held_out_conditions_at(self, places: Tensor) -> Cond:
        return self.data.held_out_conditions_at(self.places[places])


class EveryOther:
    """Every other row of samples that are read by index."""

    def __init__(self, rows: Samples, first: int):
        self.rows, self.places = rows, torch.arange(len(rows))[first::2]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), *self.rows.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any, /) -> Tensor:
        return self.rows[self.places[index]]


class Distance:
    """The distance of a student's samples by some settings, from one noise and against one half of what is held out."""

    def __init__(self, recipe: Recipe, student: Student, data: Dataset, spec: Frechet | MMD, key: str, first: int):
        half: HasReferences = Half(data, first) if data.num_held_out > 1 else data
        self.key, self.rows = key, Rows(recipe, student, None, data, [spec], None, None, references=half)

    def __call__(self, settings: Tuned) -> float:
        return self.rows.tuned(settings).student(settings.steps)[0][self.key]


def tune(
    source: str | Path,
    steps: Sequence[int] | None = None,
    *,
    metric: str | None = None,
    images: int | None = None,
    seed: int | None = None,
    scales: Sequence[float] | None = None,
    gammas: Sequence[float] = GAMMAS,
    device: torch.device | str = "cpu",
    write: bool = True,
    log: LogFunction | None = None,
) -> list[Found]:
    """The best settings for each number of steps, written to the config.json of the student's folder.

    Settings that are no better in the check are not written. steps: default the recipe's. metric: the key of a
    distance in metrics.json, by default that of the recipe's first distance. images: samples of each candidate. seed:
    of the search, other than that of evaluation. Raises ValueError that names what is wrong.
    """
    student = _tunable(source).to(device)
    assert student.folder is not None
    run = flow_alone(resolve(read_resolved(student.folder / "recipe.yaml")), student.folder)
    data, own_seed = build_data(run), run.recipe.evaluation.seed
    if seed == own_seed:
        raise ValueError(f"--seed: {seed} is the seed of evaluation, whose samples are for the check; give another")
    spec, key = _distance(run.recipe, data, metric, images)

    def distance_with(seed: int, first: int) -> Distance:
        recipe = run.recipe.changed(evaluation=replace(run.recipe.evaluation, seed=seed))
        return Distance(recipe, student, data, spec, key, first)

    search, check = distance_with(own_seed + 1 if seed is None else seed, 0), distance_with(own_seed, 1)
    gammas = (0.0,) if student.config.prior is not None else gammas
    alternatives = lambda settings: candidates(student, settings, scales, gammas)
    starts = [start_of(student, k) for k in steps or run.recipe.sampler.steps]
    found = [_tuned(start, search, check, alternatives, log) for start in starts]
    if write:
        write_tuned(student.folder / "config.json", [one.best for one in found if one.better])
    return found


def _tunable(source: str | Path) -> Student:
    """The student in that folder without tuned settings. ValueError where it cannot be tuned."""
    student = load_student(source)
    if student.folder is None or not Path(source).is_dir():
        raise ValueError(f"--student: {str(source)!r} is not a folder; settings are written to a local student")
    if not (student.folder / "recipe.yaml").is_file():
        raise ValueError(f"--student: {student.folder} has no recipe.yaml, which names data and metrics")
    if not can_be_tuned(student.config.sampler) or not student.config.arrival:
        raise ValueError("--student: only students that are flow maps, sampled by deterministic or gamma, can be tuned")
    student.config = replace(student.config, tuned=())
    return student


def write_tuned(path: Path, best: Sequence[Tuned]) -> None:
    """Add the settings to a config.json, in the place of those for the same numbers of steps."""
    kept = [one for one in read_config(path).tuned if one.steps not in {new.steps for new in best}]
    settings = tuple(sorted([*kept, *best], key=lambda one: one.steps))
    if settings:
        write_json(path, read_json(path) | {"tuned": tuned_json(settings)})


def start_of(student: Student, steps: int) -> Tuned:
    """The student's own settings as those of that number of steps."""
    sampler = student.config.sampler
    gamma = sampler.gamma if isinstance(sampler, Gamma) else 0.0
    return Tuned(steps, student.config.scale_at(steps), gamma, tuple(student.config.sampler.times(steps)[1:-1]))


def candidates(
    student: Student, settings: Tuned, scales: Sequence[float] | None, gammas: Sequence[float]
) -> list[list[Tuned]]:
    """The settings that differ from these in the scale, in gamma and in the grid: a list of each."""
    steps, found = settings.steps, []
    if student.config.guidance is not None:
        low, high, _ = student.config.guidance
        even = [low + (high - low) * i / (NUM_SCALES - 1) for i in range(NUM_SCALES)]
        found.append([replace(settings, guidance=round(scale, 4)) for scale in (scales or even)])
    if steps > 1:
        t_max = student.config.sampler.times(steps)[0]
        even = [1 - i / steps for i in range(1, steps)]
        grids = [tuple(round(t_max * s * u / (1 + (s - 1) * u), 4) for u in even) for s in SHIFTS]
        found.append([replace(settings, gamma=gamma) for gamma in gammas])
        found.append([replace(settings, middle=grid) for grid in grids])
    return found


def best_of(
    start: Tuned, at_start: float, distance: Callable[[Tuned], float], alternatives: Alternatives
) -> tuple[Tuned, float]:
    """The settings with the least distance and that distance: one setting is chosen after another, twice.

    at_start: the distance of the start.
    """
    known, best = {start: at_start}, start
    for _ in range(ROUNDS):
        before = best
        for place in range(len(alternatives(best))):
            for one in alternatives(best)[place]:
                if one not in known:
                    known[one] = distance(one)
            best = min(known, key=lambda one: known[one])
        if best == before:
            break
    return best, known[best]


def _tuned(
    start: Tuned, search: Distance, check: Distance, alternatives: Alternatives, log: LogFunction | None
) -> Found:
    def distance(settings: Tuned) -> float:
        found = search(settings)
        if log is not None:
            log(f"tuning: {described(settings)}: {search.key} {found:.4g}")
        return found

    before = distance(start)
    best, after = best_of(start, before, distance, alternatives)
    return Found(best, (before, check(start)), (after, check(best)))


def described(settings: Tuned) -> str:
    """The settings in one line."""
    scale = "" if settings.guidance is None else f", guidance {settings.guidance:g}"
    grid = f", middle {', '.join(f'{t:g}' for t in settings.middle)}" if settings.middle else ""
    gamma = f", gamma {settings.gamma:g}" if settings.steps > 1 else ""
    return f"{settings.steps} step{'s' * (settings.steps > 1)}{scale}{gamma}{grid}"


def _distance(recipe: Recipe, data: Dataset, metric: str | None, images: int | None) -> tuple[Frechet | MMD, str]:
    """The distance of the recipe that has that key, with as many samples, and its key in a row."""
    specs = {spec.key: spec for spec in recipe.metrics if isinstance(spec, (Frechet, MMD))}
    if not specs:
        raise ValueError("--metric: the student's recipe measures no distance of kind frechet or mmd")
    key = next(iter(specs)) if metric is None else metric
    if key not in specs:
        raise ValueError(f"--metric: {metric!r} is not one of {', '.join(specs)}")
    spec = specs[key] if images is None else replace(specs[key], images=images)
    return spec, key if data.num_held_out else f"{key}{TRAIN}"
