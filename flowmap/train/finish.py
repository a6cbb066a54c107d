"""The end of a run: the trained student is drawn and measured, and its figures are written. On a trained run it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from flowmap.base.files import read_json, write_json
from flowmap.plan.plan import Stage
from flowmap.plan.run_folders import stamp
from flowmap.student.student import Student
from flowmap.train.artifacts import ARTIFACTS
from flowmap.train.callbacks import AtPictures, check_weights, full_state, metric_logs, peak_gib
from flowmap.train.clock import Clock
from flowmap.train.module import DistillModule, NotFinite
from flowmap.train.run_folder import NOT_DRAWN

LogFunction = Callable[[str], None]


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
    """Draws and measures the averaged student and writes student/ and metrics.json, the latter last.

    The checkpoint of the last step and student/ are there before. again: the run was measured before; its old figures stay until the new
    ones are known. FitError where measuring or drawing fails.
    """
    try:
        check_weights(module, trainer.global_step)
    except NotFinite as error:
        raise FitError(f"{stage.recipe.name}: {error}") from error
    state, done, peak = full_state(module.averaged), trainer.global_step, peak_gib(module.device)
    artifact, path = ARTIFACTS[stage.recipe.artifact], stage.folder / "metrics.json"
    module.to(trainer.strategy.root_device)
    if module.teacher is not None:
        module.teacher.to(trainer.strategy.root_device)
    ended_early = done < stage.recipe.trainer.steps and not again  # by the clock, after a step that keeps nothing
    if ended_early and trainer.is_global_zero:
        artifact.write(stage, student, module, state, done, None)
    not_drawn = None if done < stage.recipe.trainer.steps else _drawn(trainer, module, done)
    try:
        metrics = artifact.measure(stage, student, module, log if trainer.is_global_zero else None)
    except Exception as error:
        raise _unfinished(stage, done, "measuring", reason(error)) from error
    if not trainer.is_global_zero:
        return
    metrics["seconds"]["train"] = round(seconds, 2)
    if clock is not None:
        metrics["training"] = {"seconds": round(clock.seconds, 4), "steps": done, "peak_gib": round(peak, 4)}
    if again:
        _keep_training(metrics, read_json(path))
        path.unlink()  # from here on the run counts as not measured, until the new figures are written
        stamp(stage.folder, stage.recipe)
    if not_drawn is not None:
        metrics[NOT_DRAWN] = not_drawn
    artifact.write(stage, student, module, state, done, metrics)
    for logger in trainer.loggers:
        logger.log_metrics(metric_logs(metrics), done - 1)
        logger.finalize("success")
    write_json(path, metrics)
    if not_drawn is not None:
        raise _unfinished(stage, done, "drawing its samples", not_drawn)


def _drawn(trainer: L.Trainer, module: DistillModule, done: int) -> str | None:
    """Draws the samples of the last step; what went wrong, None where nothing did."""
    try:
        for callback in trainer.callbacks:
            if isinstance(callback, AtPictures):
                callback.show(trainer, module, done)
    except Exception as error:
        return reason(error)
    return None


def _keep_training(metrics: dict[str, Any], old: dict[str, Any]) -> None:
    """What the old figures say of the training holds for the new ones."""
    if "train" in old.get("seconds", {}):
        metrics["seconds"]["train"] = old["seconds"]["train"]
    if "training" in old:
        metrics["training"] = old["training"]


def _unfinished(stage: Stage, done: int, what: str, why: str) -> FitError:
    return FitError(
        f"{stage.recipe.name}: trained for {done} steps, but {what} failed: {why}; {stage.folder / 'student'} is whole, "
        "and `flowmap fit --resume` measures it again, also with other metrics, sampler, evaluation or log"
    )


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return (
        text if text and isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {text}"
    )
