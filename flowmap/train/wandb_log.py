"""The log of a run in W&B: online for a user who is logged in, otherwise offline, also if W&B does not answer.

Errors of W&B never end a run.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from flowmap.base.files import write_text
from flowmap.base.schema import to_plain
from flowmap.plan.plan import Stage
from flowmap.recipe.kinds import TABLES
from flowmap.train.wandb_charts import Best, Chart
from flowmap.train.wandb_panels import STEP, save_view

LogFunction = Callable[[str], None]
DATA = "WANDB_DATA_DIR"
SECONDS = {"init_timeout": 15.0, "finish_timeout": 300.0}  # W&B itself waits 90 s, and at the end without a limit


def wandb_logger(
    stage: Stage, start: int, log: LogFunction, before: Sequence[Mapping[str, Any]] = ()
) -> WandbLogger | None:
    """The logger of a run that begins at step `start`; None if W&B works neither online nor offline.

    before: what the run has logged up to that step. If W&B is not online, one line is logged with the reason.
    """
    logger = _logger(stage, start, log)
    if logger is not None:
        logger.best = Best(before)
    return logger


def _logger(stage: Stage, start: int, log: LogFunction) -> _Lasting | None:
    mode = "offline"
    try:
        import wandb

        wandb.setup()  # reads WANDB_SILENT, before any warning of W&B
        mode = "offline" if _offline() else "online"
        logger = _started(stage, start, mode, log)
        if mode == "online" and not start:
            _save_view(logger.experiment, stage, log)
        return logger
    except Exception as error:  # network, key, settings, W&B's service: their errors have no common class
        if mode == "online":
            log(f"W&B: not reached ({first_line(error)}); the run is recorded offline, `wandb sync` uploads it later")
        else:
            log(f"W&B: {first_line(error)}")
    try:
        return _started(stage, start, "offline", log)
    except Exception as error:
        log(f"W&B: cannot record offline either ({first_line(error)}); log.csv has the figures")
        return None


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def close_wandb(code: int, *, preempted: bool = False) -> None:
    """Finish the run that is open in W&B, if any, so that the next run of this process is another.

    preempted: W&B shows it as preempted, to be resumed, not as failed.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            if preempted:
                wandb.run.mark_preempting()
            wandb.finish(exit_code=code)
        except Exception as error:  # the run itself is complete, whatever fails in W&B
            print(f"W&B: {first_line(error)}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _save_view(run: Any, stage: Stage, log: LogFunction) -> None:
    try:
        save_view(run, stage.recipe, log)
    except Exception as error:  # the run does not depend on it
        log(f"W&B: no view of the panels is saved ({first_line(error)})")


def _started(stage: Stage, start: int, mode: str, log: LogFunction) -> _Lasting:
    import wandb

    # a variable of the user's, such as WANDB_INIT_TIMEOUT, has priority; old versions of wandb have no finish_timeout
    ours = {
        key: value
        for key, value in SECONDS.items()
        if f"WANDB_{key.upper()}" not in os.environ and key in wandb.Settings.model_fields
    }
    # Lightning's offline=True sets its variable after wandb has read it (wandb 0.31), hence wandb.init's `mode`
    where = dict(
        name=stage.recipe.name, project=stage.recipe.log.project, save_dir=str(stage.folder), log_model=False, mode=mode
    )
    logger = _Lasting(log, **where, id=_id(stage.folder, start), resume="allow", settings=wandb.Settings(**ours))
    logger.experiment.config.update(to_plain(stage.recipe, TABLES), allow_val_change=True)
    logger.experiment.define_metric(STEP, hidden=True)  # Lightning makes it the step of all keys
    return logger


class _Lasting(WandbLogger):
    """Logs one line if W&B fails during the run, and then goes on without it."""

    def __init__(self, log: LogFunction, **settings: Any):
        super().__init__(**settings)
        self._log_line, self._failed, self._folder = log, False, settings.get("save_dir")
        self.best = Best()

    def log_metrics(self, metrics: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log figures; the best ones so far are in the run's summary under best/..."""
        self._try(super().log_metrics, metrics, *args, **kwargs)
        if best := self.best.update(metrics):
            self._try(lambda: self.experiment.summary.update(best))

    def log_chart(self, chart: Chart, step: int) -> None:
        self._try(lambda: WandbLogger.log_metrics(self, {f"charts/{chart.name}": _plot(chart)}, step))

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().log_image, *args, **kwargs)

    def log_table(self, key: str, columns: Any = None, data: Any = None, *args: Any, **kwargs: Any) -> None:
        """Log a table; its pictures become those of W&B."""
        self._try(lambda: WandbLogger.log_table(self, key, columns, _with_images(data), *args, **kwargs))

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            with _data_in(self._folder):
                call(*args, **kwargs)
        except Exception as error:  # W&B's service may have been killed, or the disk is full
            self._failed = True
            self._log_line(f"W&B: {first_line(error)}; nothing more is recorded there, log.csv has the figures")


@contextmanager
def _data_in(folder: str | None) -> Iterator[None]:
    """Keep the pictures of tables in FOLDER/wandb/flowmap-tables until they are uploaded.

    By default they lie in the user's home. A folder of the user's, WANDB_DATA_DIR, has priority.
    """
    if folder is None or DATA in os.environ:
        yield
        return
    os.environ[DATA] = str(Path(folder).absolute() / "wandb" / "flowmap-tables")
    try:
        yield
    finally:
        del os.environ[DATA]


def _plot(chart: Chart) -> Any:
    import wandb

    xs, ys = ([[point[i] for point in points] for points in chart.lines.values()] for i in (0, 1))
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(chart.lines), title=chart.title, xname=chart.x)


def _with_images(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    import wandb

    return [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]


def _id(folder: Path, start: int) -> str:
    """The id of the W&B run that a resumed run continues, or of a new one.

    In a sweep W&B ignores an id that is given to `wandb.init`: the run has that of the agent.
    """
    path = folder / "wandb" / "run-id"
    if in_sweep() and (of_agent := os.environ.get("WANDB_RUN_ID")):
        write_text(path, of_agent)
    elif not (start and path.is_file()):
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def _offline() -> bool:
    """Whether W&B stays offline: the user is not logged in, or set WANDB_MODE."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    return mode != "online" if mode else not wandb.login(prompt=False, verify=False)
