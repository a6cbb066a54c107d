"""`fit`: make what a recipe needs, then train the recipe itself; a run folder is filled, resumed, or left alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmap.base.distributed import is_child
from flowmap.base.files import POLL, check_writable, only_process, read_json, real_folder
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.estimate.dry_run import check_stages
from flowmap.plan.pictures import describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, Stage, resolve
from flowmap.plan.references import ReferenceStatistics
from flowmap.plan.run_folders import runs_root
from flowmap.prepare.encode import encode
from flowmap.prepare.make_pairs import make_pairs
from flowmap.prepare.reference import make_reference
from flowmap.recipe import Recipe
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.train.clock import Clock
from flowmap.train.finish import FitError
from flowmap.train.run_folder import guard, measures_again, recover
from flowmap.train.stage import device_of, run_stage

__all__ = ["FitError", "Run", "device_of", "fit", "make", "silent", "waiting_for"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the contents of its metrics.json (empty in all processes but the first)."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def student(self) -> Student:
        return load_student(self.folder / "student")


def fit(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    log: LogFunction | None = None,
    clock: Clock | None = None,
    shared: bool = False,
) -> Run:
    """Train the recipe, and first whatever it needs; stages that are complete and unchanged are skipped.

    out: the run folder, default runs/<recipe name>. A folder that has another run, or an unfinished one, is touched
    only with resume or overwrite. clock: counts the seconds of the recipe's own training, and may end it before its
    last step. shared: if another process fills the folder, wait for it, as for whatever the recipe needs. Raises
    RecipeError for a user's mistake, FitError if training had to stop.
    """
    log = silent if is_child() else log or (lambda message: print(message, file=sys.stderr, flush=True))
    folder = real_folder(Path(out) if out else runs_root() / recipe.name, "--out")
    if recipe.missing():
        raise RecipeError(
            f"{recipe.name}: {', '.join(recipe.missing())}: must be given, as key=value or in a recipe of your own"
        )
    last = resolve(recipe, folder)
    stages = last.stages
    if is_child():
        _make_needed(stages[:-1], log)
        _make_last(last, len(stages), resume=resume, overwrite=overwrite, log=log, clock=clock)
        return Run(folder, {})  # the first process may still be writing metrics.json
    check_writable(folder, "--out")
    with only_process(folder, waiting_for(recipe.name, folder, log) if shared else None):
        recover(folder, log)
        guard(last, resume=resume, overwrite=overwrite)
        check_stages(stages, again=overwrite)  # before pictures are encoded for hours
        _make_needed(stages[:-1], log)
        _make_last(last, len(stages), resume=resume, overwrite=overwrite, log=log, clock=clock)
    return Run(folder, read_json(folder / "metrics.json"))


def _make_needed(stages: list[Needed], log: LogFunction) -> None:
    """Make the stages that the recipe needs and that are not complete, in order."""
    for i, stage in enumerate(stages):
        label = f"[{i + 1}/{len(stages) + 1}] {stage.recipe.name}"
        waiting = waiting_for(label, stage.folder, log)
        if stage.complete:
            _log_complete(label, stage, log)
        elif not isinstance(stage, Stage):
            log(f"{label}: {_made(stage)} {stage.folder}")
            make(stage, log, waiting)
        else:
            _train_needed(stage, label, waiting, log)


def _train_needed(stage: Stage, label: str, waiting: Callable[[], None], log: LogFunction) -> None:
    """Train a stage, unless another process completes it while this one waits."""
    log(f"{label}: {stage.recipe.trainer.steps} steps -> {stage.folder}")
    with nullcontext() if is_child() else only_process(stage.folder, waiting):
        if stage.complete:
            log(f"{label}: complete in {stage.folder}, made by another process")
        else:
            run_stage(stage, resume=True, overwrite=False, again=False, log=log, clock=None)


def _make_last(
    stage: Stage, count: int, *, resume: bool, overwrite: bool, log: LogFunction, clock: Clock | None
) -> None:
    """Train the recipe itself; the caller has the lock on its folder and has called `guard`."""
    label = f"[{count}/{count}] {stage.recipe.name}"
    again = not overwrite and measures_again(stage, resume=resume, log=clock is None)
    if stage.complete and not again and not overwrite:
        _log_complete(label, stage, log)
        return
    log(f"{label}: {'measured again' if again else f'{stage.recipe.trainer.steps} steps'} -> {stage.folder}")
    run_stage(stage, resume=resume, overwrite=overwrite, again=again, log=log, clock=clock)


def _log_complete(label: str, stage: Needed, log: LogFunction) -> None:
    log(f"{label}: complete in {stage.folder}")
    for line in describe_pictures(stage) if isinstance(stage, Encoding) else ():
        log(line)


def _made(stage: Encoding | Pairing | ReferenceStatistics) -> str:
    """What the stage makes, in words."""
    if isinstance(stage, Pairing):
        return f"{stage.run.pairs.num} pairs ->"
    return f"its pictures -> {stage.makes} in"


def silent(message: str) -> None: ...


def waiting_for(label: str, folder: Path, log: LogFunction) -> Callable[[], None]:
    """A function that logs that another process is making that folder."""
    return lambda: log(f"{label}: another flowmap process is filling {folder}; waiting for it")


def make(
    stage: Encoding | Pairing | ReferenceStatistics, log: LogFunction, waiting: Callable[[], None] | None = None
) -> None:
    """Make what the stage puts on disk, or the missing part. RecipeError names the recipe."""
    device = device_of(stage.recipe)

    def made() -> bool:
        if isinstance(stage, ReferenceStatistics):
            return make_reference(stage, device=device, log=log, waiting=waiting) is not None
        if isinstance(stage, Pairing):
            return make_pairs(stage.run, stage.folder, device=device, log=log, waiting=waiting) is not None
        return encode(stage.spec, stage.folder, device=device, log=log, waiting=waiting) is not None

    try:
        while not made():  # another process completes it just now
            time.sleep(POLL)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{stage.recipe.name}: {error}") from error
