"""The end of a run: draw and measure the trained student and write its figures. A trained run can repeat it."""

from __future__ import annotations

from typing import Any

import lightning as L

from flowmap.base.files import read_json, write_json
from flowmap.base.progress import LogFunction
from flowmap.plan.plan import Stage
from flowmap.plan.run_folders import stamp
from flowmap.student.student import Student
from flowmap.train.artifacts import ARTIFACTS, Ended
from flowmap.train.callbacks import AtPictures, check_weights, full_state, metric_logs, peak_gib
from flowmap.train.clock import Clock
from flowmap.train.csv_log import read_log
from flowmap.train.finite import NotFinite
from flowmap.train.logging import log_charts
from flowmap.train.module import DistillModule
from flowmap.train.run_folder import NOT_DRAWN
from flowmap.train.wandb_charts import charts_of

METRICS = "metrics.json"


class FitError(RuntimeError):
    """A run that stopped for a reason that the user can act on."""


def finish(
    stage: Stage,
    student: Student,
    module: DistillModule,
    trainer: L.Trainer,
    seconds: float,
    log: LogFunction,
    clock: Clock | None,
    *,
    again: bool,
) -> None:
    """Draw and measure the averaged student and write student/ and metrics.json, the latter last.

    The checkpoint of the last step and student/ exist already. again: the run was measured before; its old figures stay
    until the new ones are known. Raises FitError if measuring or drawing fails.
    """
    _check_weights(stage, module, trainer)
    state, done, peak = full_state(module.averaged), trainer.global_step, peak_gib(module.device)
    artifact, run = ARTIFACTS[stage.recipe.artifact], Ended(stage, student, module, state, done)
    module.to(trainer.strategy.root_device)
    if module.teacher is not None:
        module.teacher.to(trainer.strategy.root_device)
    whole = done >= stage.recipe.trainer.steps
    if not whole and not again and trainer.is_global_zero:  # ended by the clock, after a step that saves nothing
        artifact.write(run, None)
    not_drawn = _drawn(trainer, module, done) if whole else None
    metrics = _measured(stage, student, module, done, log if trainer.is_global_zero else None)
    if not trainer.is_global_zero:
        return
    metrics["seconds"]["train"] = round(seconds, 2)
    if clock is not None:
        metrics["training"] = {"seconds": round(clock.seconds, 4), "steps": done, "peak_gib": round(peak, 4)}
    if again:
        _replace_figures(stage, metrics)
    if not_drawn is not None:
        metrics[NOT_DRAWN] = not_drawn
    artifact.write(run, metrics)
    _log(stage, trainer, metrics, done)
    write_json(stage.folder / METRICS, metrics)
    if not_drawn is not None:
        raise _unfinished(stage, done, "drawing its samples", not_drawn)


def _check_weights(stage: Stage, module: DistillModule, trainer: L.Trainer) -> None:
    """Raise FitError if a weight is not finite."""
    try:
        check_weights(module, trainer.global_step)
    except NotFinite as error:
        raise FitError(f"{stage.recipe.name}: {error}") from error


def _drawn(trainer: L.Trainer, module: DistillModule, done: int) -> str | None:
    """Draw the samples of the last step; returns the error in one line, None if there was none."""
    try:
        for callback in trainer.callbacks:
            if isinstance(callback, AtPictures):
                callback.show(trainer, module, done)
    except Exception as error:
        return reason(error)
    return None


def _measured(
    stage: Stage, student: Student, module: DistillModule, done: int, log: LogFunction | None
) -> dict[str, Any]:
    """The figures of the trained student. Raises FitError if they cannot be measured."""
    try:
        return ARTIFACTS[stage.recipe.artifact].measure(stage, student, module, log)
    except Exception as error:
        raise _unfinished(stage, done, "measuring", reason(error)) from error


def _log(stage: Stage, trainer: L.Trainer, metrics: dict[str, Any], done: int) -> None:
    """Pass figures and charts to the loggers at the last step, and close the loggers."""
    for logger in trainer.loggers:
        logger.log_metrics(metric_logs(metrics), done - 1)
    path = stage.folder / "log.csv"
    log_charts(trainer, charts_of(metrics, read_log(path) if path.is_file() else []), done)
    for logger in trainer.loggers:
        logger.finalize("success")


def _replace_figures(stage: Stage, metrics: dict[str, Any]) -> None:
    """Copy what the old figures have about the training, and remove them.

    From here on the run counts as not measured, until the new figures are written.
    """
    old = read_json(stage.folder / METRICS)
    if "train" in old.get("seconds", {}):
        metrics["seconds"]["train"] = old["seconds"]["train"]
    if "training" in old:
        metrics["training"] = old["training"]
    (stage.folder / METRICS).unlink()
    stamp(stage.folder, stage.recipe)


def _unfinished(stage: Stage, done: int, what: str, why: str) -> FitError:
    return FitError(
        f"{stage.recipe.name}: trained for {done} steps, but {what} failed: {why}; "
        f"{stage.folder / 'student'} is whole, "
        "and `flowmap fit --resume` measures it again, also with other metrics, sampler, evaluation or log"
    )


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    plain = text and isinstance(error, (ValueError, OSError, RuntimeError))
    return text if plain else f"{type(error).__name__}: {text}"
