"""Progress of a training run on stderr: a bar on a terminal, lines elsewhere, with the loss and the residual norm.

The losses of most objectives are normalised and hardly move; the residual norm, log.csv's `train/residual_norm`, does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning as L
from tqdm import tqdm

from flowmap.base.progress import Now, Pace, duration, on_terminal
from flowmap.train.callbacks import AtSteps
from flowmap.train.module import DistillModule


class Bar(AtSteps):
    """Shows the step, the loss, the residual norm, the speed and the time left; in the first process alone.

    Without a terminal it passes a line to `log` after the first step, after the last one and, every `every` steps, if
    the last line is at least 10 seconds old.
    """

    def __init__(self, every: int, log: Callable[[str], None], now: Now = time.monotonic):
        super().__init__()
        self.every, self.print, self.now = every, log, now
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.shown, self.bar = trainer.is_global_zero, None
        self.start, self.first, self.began = trainer.global_step, 0, 0.0
        self.pace = Pace(now=self.now)
        if self.shown and on_terminal():
            options = dict(total=trainer.max_steps, initial=self.start, unit="step", dynamic_ncols=True, leave=False)
            self.bar = tqdm(**options)

    def at(self, trainer: L.Trainer, module: DistillModule, done: int) -> None:
        if not self.shown:
            return
        if not self.first:  # the speed is counted from the end of the first step, which also compiles and fills caches
            self.first, self.began = done, self.now()
        ends = done in (self.first, trainer.max_steps)
        due = ends or done % self.every == 0
        if self.bar is not None:
            if due:
                self.bar.set_postfix({key: f"{value:.4g}" for key, value in shown(module).items()}, refresh=False)
            self.bar.update()
        elif due and self.pace.due(always=ends):
            self.print(self.line(trainer.max_steps, module, done))

    def line(self, steps: int, module: DistillModule, done: int) -> str:
        """step 500/3800  loss 0.812  residual 0.043  12.3 it/s  4:28 left"""
        parts = [f"step {done}/{steps}", *(f"{key} {value:.3g}" for key, value in shown(module).items())]
        seconds = self.now() - self.began
        if done > self.first and seconds > 0:
            rate = (done - self.first) / seconds
            parts += [f"{rate:.3g} it/s", f"{duration((steps - done) / rate)} left"]
        return "  ".join(parts)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def shown(module: DistillModule) -> dict[str, float]:
    """The last step's loss and, if the objective logs one, the norm of its residual."""
    loss = module.last_loss
    assert loss is not None, "no step has been made"
    values = {"loss": float(loss.value.detach())}
    if "residual_norm" in loss.logs:
        values["residual"] = float(loss.logs["residual_norm"].mean())
    return values
