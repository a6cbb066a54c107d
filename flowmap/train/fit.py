"""`fit`: make what a recipe needs, then train the recipe itself; a run folder is filled, resumed, or left alone.

All processes of the command run it together (base/team.py): the first one locks folders and decides, all make data.
"""

from __future__ import annotations

import errno
import functools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmap.base.distributed import is_child
from flowmap.base.files import check_writable, only_process, read_json, real_folder
from flowmap.base.preempt import preemptible
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.base.team import Team, the_team
from flowmap.build.given import with_given
from flowmap.estimate.dry_run import check_stages
from flowmap.plan.pictures import describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, Stage, resolve
from flowmap.plan.references import ReferenceStatistics
from flowmap.plan.run_folders import runs_root
from flowmap.recipe import Recipe
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.train.checkpoints import repair
from flowmap.train.clock import Clock
from flowmap.train.extend import extend as extend_run
from flowmap.train.finish import FitError
from flowmap.train.make import make, waiting_for
from flowmap.train.processes import check_processes, processes_of
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


@dataclass(frozen=True)
class Wanted:
    """What `fit` may do with the run that is in the folder, and whether it waits for another process that fills it."""

    resume: bool
    overwrite: bool
    shared: bool
    clock: Clock | None
    extend: bool = False
    needed: bool = False  # by the recipe of the command


def fit(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    teacher: Any = None,
    student: Any = None,
    data: Any = None,
    resume: bool | str = False,
    overwrite: bool = False,
    extend: bool = False,
    log: LogFunction | None = None,
    clock: Clock | None = None,
    shared: bool = False,
) -> Run:
    """Train the recipe, and first whatever it needs; stages that are complete and unchanged are skipped.

    teacher, student, data: modules and samples of one's own in place of the recipe's: what `flowmap.wrap` returns, a
    module net(x, t, s) as a student, and what `flowmap.as_data` returns or takes.
    out: the run folder, default runs/<recipe name>. A folder that has another run, or an unfinished one, is touched
    only with resume or overwrite. resume: "auto" also waits for another process that still ends in the folder, so that
    one command starts, resumes or finds the run finished. extend: go on with the folder's run although the recipe has
    another trainer.steps, optimizer.lr or optimizer.schedule. clock: counts the seconds of the recipe's own training,
    and may end it before its last step. shared: if another process fills the folder, wait for it, as for whatever the
    recipe needs. Raises RecipeError for a user's mistake, FitError if training had to stop, Preempted if a signal asked
    for it.
    """
    recipe = with_given(recipe, teacher, student, data)
    log = silent if is_child() else log or (lambda message: print(message, file=sys.stderr, flush=True))
    folder = real_folder(Path(out) if out else runs_root() / recipe.name, "--out")
    if recipe.missing():
        raise RecipeError(
            f"{recipe.name}: {', '.join(recipe.missing())}: must be given, as key=value or in a recipe of your own"
        )
    if resume not in (False, True, "auto"):
        raise ValueError(f"resume: {resume!r} is not one of False, True, 'auto'")
    if overwrite and (resume == "auto" or extend):
        raise ValueError("--overwrite: starts a new run; --resume auto and --extend go on with the one that is there")
    run, team = resolve(recipe, folder), the_team()
    wanted = Wanted(bool(resume) or extend, overwrite, shared or resume == "auto", clock, extend)
    with preemptible(), team.failing(_status):
        _fit(run, team, wanted, log)
    return Run(folder, read_json(folder / "metrics.json") if team.first else {})


def _status(error: BaseException) -> int:
    """The exit status of the command after that error (cli/__init__.py)."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    mistake = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno != errno.ENOSPC)
    return 2 if mistake else 1


def _fit(run: Stage, team: Team, wanted: Wanted, log: LogFunction) -> None:
    stages = run.stages
    if team.launch.by:  # the others are there, or wait for those of this machine
        team.start(run.recipe.trainer.devices, run.recipe.trainer.num_nodes)
    if team.first:
        check_writable(run.folder, "--out")
    with _lock(team, run.folder, waiting_for(run.recipe.name, run.folder, log) if wanted.shared else None):
        again = False
        if team.first:
            recover(run.folder, log)
            if wanted.extend:
                extend_run(run, log)
            guard(run, resume=wanted.resume, overwrite=wanted.overwrite)
            check_stages(stages, again=wanted.overwrite)  # before pictures are encoded for hours
            again = not wanted.overwrite and measures_again(run, resume=wanted.resume, log=wanted.clock is None)
            unfinished = [one for one in stages if isinstance(one, Stage) and not one.complete]
            unfinished += [run] * (again or wanted.overwrite)
            check_processes(team.launch, unfinished)
            team.start(*max((processes_of(one.recipe) for one in unfinished), key=math.prod, default=(1, 1)))
        again = team.decide(functools.partial(bool, again))
        _make_needed(stages[:-1], team, log)
        _make_last(run, team, wanted, again, log)


def _lock(team: Team, folder: Path, waiting: Callable[[], None] | None) -> AbstractContextManager[None]:
    """The lock on the folder, which the first process holds for all."""
    return only_process(folder, waiting) if team.first else nullcontext()


def _make_needed(stages: list[Needed], team: Team, log: LogFunction) -> None:
    """Make the stages that the recipe needs and that are not complete, in order."""
    for i, stage in enumerate(stages):
        label = f"[{i + 1}/{len(stages) + 1}] {stage.recipe.name}"
        waiting = waiting_for(label, stage.folder, log)
        if team.decide(functools.partial(is_made, stage)):
            _log_complete(label, stage, log)
        elif not isinstance(stage, Stage):
            log(f"{label}: {_made(stage)} {stage.folder}")
            make(stage, log, waiting)
        else:
            _train_needed(stage, team, label, waiting, log)


def is_made(stage: Needed) -> bool:
    return stage.complete


def _train_needed(stage: Stage, team: Team, label: str, waiting: Callable[[], None], log: LogFunction) -> None:
    """Train a stage, unless another command completes it while this one waits."""
    log(f"{label}: {stage.recipe.trainer.steps} steps -> {stage.folder}")
    wanted = Wanted(resume=True, overwrite=False, shared=True, clock=None, needed=True)
    with _lock(team, stage.folder, waiting):
        if team.decide(lambda: stage.complete):
            log(f"{label}: complete in {stage.folder}, made by another process")
        else:
            _train(stage, team, wanted, False, label, log)


def _make_last(run: Stage, team: Team, wanted: Wanted, again: bool, log: LogFunction) -> None:
    """Train the recipe itself; the first process has the lock on its folder and has called `guard`."""
    label = f"[{len(run.stages)}/{len(run.stages)}] {run.recipe.name}"
    if team.decide(lambda: run.complete and not again and not wanted.overwrite):
        _log_complete(label, run, log)
        return
    log(f"{label}: {'measured again' if again else f'{run.recipe.trainer.steps} steps'} -> {run.folder}")
    _train(run, team, wanted, again, label, log)


def _train(stage: Stage, team: Team, wanted: Wanted, again: bool, label: str, log: LogFunction) -> None:
    """Train the stage on its own number of processes; the others wait until it is complete."""
    devices, nodes = processes_of(stage.recipe)
    if devices * nodes < team.launch.world:
        log(f"{label}: on {devices * nodes} of {team.launch.world} processes; the others wait")
    if wanted.resume and not wanted.overwrite:
        team.decide(lambda: repair(stage.folder, log))
    with team.group(devices * nodes, device_of(stage.recipe)) as member:
        if member:
            run_stage(
                stage,
                resume=wanted.resume,
                overwrite=wanted.overwrite,
                again=again,
                needed=wanted.needed,
                log=log,
                clock=wanted.clock,
            )
    team.wait(lambda missing: log(f"{label}: waiting for {missing} of {team.launch.world} processes"))


def _log_complete(label: str, stage: Needed, log: LogFunction) -> None:
    log(f"{label}: complete in {stage.folder}")
    for line in describe_pictures(stage) if isinstance(stage, Encoding) else ():
        log(line)


def _made(stage: Encoding | Pairing | ReferenceStatistics) -> str:
    """What the stage makes, in words."""
    if isinstance(stage, Pairing):
        return f"{stage.makes} ->"
    return f"its pictures -> {stage.makes} in"


def silent(message: str) -> None: ...
