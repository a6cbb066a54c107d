"""Where a run logs its figures and pictures: log.csv, W&B; and Lightning's own messages, which are turned off."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from PIL import Image

from flowmap.base.distributed import is_child
from flowmap.base.progress import LogFunction
from flowmap.plan.plan import Stage
from flowmap.train.csv_log import CSVLog
from flowmap.train.wandb_charts import Chart
from flowmap.train.wandb_log import in_sweep, wandb_logger


def loggers_of(stage: Stage, start: int, log: LogFunction, *, needed: bool = False) -> list[Any]:
    """The loggers of a run that begins at step `start`; none in the processes other than the first.

    needed: it is trained because another recipe needs it. In a sweep it is not logged in W&B, which would record it in
    the run of that recipe: the agent gives one id to all runs of the process.
    """
    if is_child():
        return []
    table = CSVLog(stage.folder / "log.csv", keep_below=start)
    loggers: list[Any] = [table]
    wanted = stage.recipe.log.wandb and os.environ.get("WANDB_MODE") != "disabled"
    if wanted and needed and in_sweep():
        log(f"W&B: {stage.recipe.name} is in log.csv alone: the sweep's run is of the recipe that needs it")
    elif wanted:
        logger = wandb_logger(stage, start, log, table.rows)
        loggers += [] if logger is None else [logger]
    return loggers


def log_pictures(trainer: L.Trainer, grids: Mapping[str, Image.Image], done: int) -> None:
    """Log each grid as `samples/NAME` after `done` steps."""
    for logger in trainer.loggers:
        for name, grid in grids.items():
            logger.log_image(f"samples/{name}", [grid], step=done - 1)


def log_table(trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], done: int) -> None:
    """Log a table, whose cells may be pictures, after `done` steps."""
    for logger in trainer.loggers:
        logger.log_table(name, list(columns), [list(row) for row in rows], step=done - 1)


def log_charts(trainer: L.Trainer, charts: Sequence[Chart], done: int) -> None:
    """Log each chart as `charts/NAME` after `done` steps."""
    for logger in trainer.loggers:
        for chart in charts:
            logger.log_chart(chart, done - 1)


def quiet_lightning() -> None:
    """Turn off Lightning's advice on workers, hardware and sanity checks, which is not for users of flowmap."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
    # no code of flowmap writes into a network's output
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
