"""Search of the settings of a trained student for each number of steps: guidance scale, gamma and time grid.

Candidates are compared by one distance, on generated samples from the search's own noise against one half of the
held-out samples. What is found is measured once more, from the noise of evaluation against the other half, so that the
figure that is reported is not the one that was selected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import read_json, weights_hash, write_json
from flowmap.base.progress import LogFunction, Progress
from flowmap.build.data import build_data
from flowmap.build.text import flow_alone
from flowmap.data import Dataset
from flowmap.evaluation.halving import Round, halved, rounds_of
from flowmap.evaluation.journal import Journal
from flowmap.evaluation.rows import Rows
from flowmap.flow.types import Cond
from flowmap.metrics import MMD, Frechet, PrecisionRecall
from flowmap.metrics.against import TRAIN, HasReferences
from flowmap.metrics.real import Rows as Samples
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.samplers import Gamma
from flowmap.student.conditions import no_scale
from flowmap.student.config_file import read_config
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.student.tuned import Figure, Tuned, can_be_tuned, tuned_json

GAMMAS = (0.0, 0.3, 0.6, 0.9)
SHIFTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of even grids
NUM_SCALES = 5  # even in the range that the student was trained on
JOURNAL = "tuning.json"  # what an unfinished search has measured, in the student's folder
Figures = dict[str, float]
Spec = Frechet | MMD | PrecisionRecall


@dataclass(frozen=True)
class Found:
    """The best settings for a number of steps, with their distance in the search and all figures of the check, before
    and after. start: the student's own settings. key: that of the distance.
    """

    start: Tuned
    best: Tuned
    key: str
    search: tuple[float, float]
    check: tuple[Figures, Figures]

    @property
    def better(self) -> bool:
        """Whether the check, which took no part in the selection, is better too."""
        before, after = self.check
        return after[self.key] < before[self.key]

    @property
    def measured(self) -> Tuned:
        """The settings with the figures of the check."""
        before, after = self.check
        keys = [self.key, *(key for key in before if key != self.key)]
        return replace(self.best, figures=tuple(Figure(key, before[key], after[key]) for key in keys))


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


class Measured:
    """The figures of a student's samples by some settings, from one noise and against one half of what is held out."""

    def __init__(self, recipe: Recipe, student: Student, data: Dataset, specs: Sequence[Spec], first: int):
        half: HasReferences = Half(data, first) if data.num_held_out > 1 else data
        self.suffix = "" if data.num_held_out else TRAIN
        self.rows = Rows(recipe, student, None, data, specs, None, None, references=half)

    def __call__(self, settings: Tuned) -> Figures:
        """The figures against the held-out half; against training samples where nothing is held out."""
        row = self.rows.tuned(settings).student(settings.steps)[0]
        return {key: value for key, value in row.items() if key.endswith(TRAIN) == bool(self.suffix)}


@dataclass(frozen=True)
class Search:
    """A search that has been checked and not begun. sides: the recipe, with its seed, and the half, of search and
    check.
    """

    student: Student
    data: Dataset
    specs: tuple[Spec, ...]  # that of the distance first
    key: str
    sides: tuple[tuple[Recipe, int], tuple[Recipe, int]]
    candidates: tuple[tuple[Tuned, tuple[Tuned, ...]], ...]  # the start and the others, for each number of steps

    @property
    def folder(self) -> Path:
        assert self.student.folder is not None
        return self.student.folder

    def rounds(self) -> list[tuple[int, list[Round]]]:
        """The rounds of each number of steps, the start not counted."""
        return [(start.steps, rounds_of(len(others), self.specs[0].images)) for start, others in self.candidates]

    @property
    def stamp(self) -> dict[str, Any]:
        """All that a measured distance depends on beside settings and samples."""
        seeds = [recipe.evaluation.seed for recipe, _ in self.sides]
        weights, recipe = weights_hash(self.folder), self.sides[1][0].hash()
        return {"weights": weights, "recipe": recipe, "specs": repr(self.specs), "key": self.key, "seeds": seeds}

    def run(self, journal: Journal, log: LogFunction | None) -> list[Found]:
        """Search and check every number of steps; what is in the journal is not measured again."""
        measured: dict[tuple[int, int], Measured] = {}

        def figures(side: int, settings: Tuned, samples: int) -> Figures:
            if (side, samples) not in measured:
                recipe, first = self.sides[side]
                specs = self.specs if side else (replace(self.specs[0], images=samples),)
                measured[side, samples] = Measured(recipe, self.student, self.data, specs, first)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*the Frechet distance is far too high")  # alike for all
                return measured[side, samples](settings)

        def known(side: int, settings: Tuned, samples: int) -> Figures:
            name = f"{'check' if side else 'search'}: {described(settings)}: {samples} samples"
            return journal.get(name, lambda: figures(side, settings, samples))

        return [self._searched(start, others, known, log) for start, others in self.candidates]

    def _searched(self, start: Tuned, others: Sequence[Tuned], known, log: LogFunction | None) -> Found:
        samples = self.specs[0].images
        total = sum((one.candidates + 1) * one.samples for one in rounds_of(len(others), samples))
        label = f"tuning: {start.steps} step{'s' * (start.steps > 1)}"
        with Progress(total, label, log) as count:

            def distance(settings: Tuned, samples: int) -> float:
                found = known(0, settings, samples)[self.key]
                count(samples)
                return found

            best, after, before = halved(start, others, samples, distance)
        if log is not None:
            log(f"{label}: {described(best)}: {self.key} {after:.4g}, before {before:.4g}")
        return Found(start, best, self.key, (before, after), (known(1, start, samples), known(1, best, samples)))


def prepared(
    source: str | Path,
    steps: Sequence[int] | None = None,
    *,
    metric: str | None = None,
    images: int | None = None,
    seed: int | None = None,
    scales: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    shifts: Sequence[float] = SHIFTS,
    device: torch.device | str = "cpu",
) -> Search:
    """A search, with everything checked; nothing is drawn. The arguments are those of `tune`."""
    student = _tunable(source).to(device)
    assert student.folder is not None
    gammas = _gammas(student, gammas)
    _check_settings(student, steps, images, scales, shifts)
    run = flow_alone(resolve(read_resolved(student.folder / "recipe.yaml")), student.folder)
    data, own = build_data(run), run.recipe.evaluation.seed
    if seed == own:
        raise ValueError(f"--seed: {seed} is the seed of evaluation, whose samples are for the check; give another")
    specs, key = _specs(run.recipe, data, metric, images)
    seeded = [
        run.recipe.changed(evaluation=replace(run.recipe.evaluation, seed=one))
        for one in (own + 1 if seed is None else seed, own)
    ]
    starts = [start_of(student, k) for k in dict.fromkeys(steps or run.recipe.sampler.steps)]
    tried = [[one for one in candidates(student, start, scales, gammas, shifts) if one != start] for start in starts]
    others = tuple((start, tuple(one)) for start, one in zip(starts, tried, strict=True))
    return Search(student, data, specs, key, ((seeded[0], 0), (seeded[1], 1)), others)


def tune(
    source: str | Path,
    steps: Sequence[int] | None = None,
    *,
    write: bool = True,
    log: LogFunction | None = None,
    **options: Any,
) -> list[Found]:
    """The best settings for each number of steps, written with their figures to config.json in the student's folder.

    Settings that are no better in the check are not written. Without `write` nothing is. An interrupted search is
    continued by the same call: what it has measured is in tuning.json of that folder until it ends.

    steps       default: the recipe's
    metric      the key of a distance in metrics.json, by default that of the recipe's first distance
    images      samples of each candidate in the last round; the first rounds have fewer (halving.py)
    seed        of the search, other than that of evaluation
    scales      guidance scales, by default five in the range that the student was trained on
    gammas, shifts      amounts of noise between steps; shifts of the even grid
    device      where samples are drawn

    Raises ValueError that names what is wrong.
    """
    search = prepared(source, steps, **options)
    with Journal(search.folder / JOURNAL if write else None, search.stamp) as journal:
        found = search.run(journal, log)
        if write:
            write_tuned(search.folder / "config.json", [one.measured for one in found if one.better])
        journal.done()
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


def _gammas(student: Student, gammas: Sequence[float] | None) -> Sequence[float]:
    """The gammas to try, by default GAMMAS. ValueError for one that the student cannot be sampled with."""
    if student.config.prior is not None:
        if gammas is not None and any(gammas):
            raise ValueError("--gammas: noise from N(0, I) is added, and this student starts from a learned prior")
        return (0.0,)
    for gamma in gammas or ():
        if not 0 <= gamma <= 1:
            raise ValueError(f"--gammas: {gamma} must lie in 0..1")
    return GAMMAS if gammas is None else gammas


def _check_settings(
    student: Student,
    steps: Sequence[int] | None,
    images: int | None,
    scales: Sequence[float] | None,
    shifts: Sequence[float],
) -> None:
    """Raise ValueError, the option first, for a value that cannot be tried."""
    if scales and student.config.guidance is None:
        raise ValueError(f"--scales: {no_scale(student.config.baked_guidance)}")
    if bad := [scale for scale in scales or () if not 0 <= scale < math.inf]:
        raise ValueError(f"--scales: {bad[0]} must be 0 or more")
    if bad := [shift for shift in shifts if not 0 < shift < math.inf]:
        raise ValueError(f"--shifts: {bad[0]} must be above 0")
    if bad := [k for k in steps or () if k < 1]:
        raise ValueError(f"--steps: {bad[0]} must be 1 or more")
    if images is not None and images < 2:
        raise ValueError(f"--images: {images} must be 2 or more")


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
    student: Student,
    start: Tuned,
    scales: Sequence[float] | None,
    gammas: Sequence[float],
    shifts: Sequence[float] = SHIFTS,
) -> list[Tuned]:
    """All combinations of a scale, a gamma and a grid, with the start's own scale and grid among them."""
    steps, own_scale = start.steps, [start.guidance]
    if student.config.guidance is not None:
        low, high, _ = student.config.guidance
        even = [round(low + (high - low) * i / (NUM_SCALES - 1), 4) for i in range(NUM_SCALES)]
        own_scale = [*(scales or even), *([] if scales else own_scale)]
    if steps == 1:
        return [replace(start, guidance=scale) for scale in dict.fromkeys(own_scale)]
    t_max, even = student.config.sampler.times(steps)[0], [1 - i / steps for i in range(1, steps)]
    grids = [tuple(round(t_max * s * u / (1 + (s - 1) * u), 4) for u in even) for s in shifts]
    tried = product(dict.fromkeys(own_scale), dict.fromkeys(gammas), dict.fromkeys([start.middle, *grids]))
    return [Tuned(steps, scale, gamma, grid) for scale, gamma, grid in tried]


def described(settings: Tuned) -> str:
    """The settings in one line."""
    scale = "" if settings.guidance is None else f", guidance {settings.guidance:g}"
    grid = f", middle {', '.join(f'{t:g}' for t in settings.middle)}" if settings.middle else ""
    gamma = f", gamma {settings.gamma:g}" if settings.steps > 1 else ""
    return f"{settings.steps} step{'s' * (settings.steps > 1)}{scale}{gamma}{grid}"


def _specs(recipe: Recipe, data: Dataset, metric: str | None, images: int | None) -> tuple[tuple[Spec, ...], str]:
    """The distance of the recipe that has that key, then all that the check measures, and its key in a row."""
    distances = {spec.key: spec for spec in recipe.metrics if isinstance(spec, (Frechet, MMD))}
    if not distances:
        raise ValueError("--metric: the student's recipe measures no distance of kind frechet or mmd")
    key = next(iter(distances)) if metric is None else metric
    if key not in distances:
        raise ValueError(f"--metric: {metric!r} is not one of {', '.join(distances)}")
    spec = distances[key] if images is None else replace(distances[key], images=images)
    others = [one for one in recipe.metrics if isinstance(one, Spec) and one is not distances[key]]
    return (spec, *others), key if data.num_held_out else f"{key}{TRAIN}"
