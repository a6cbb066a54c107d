"""The clock of a run: the seconds of training alone, and the end of the run when they are spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import lightning as L

from flowmap.train.module import DistillModule

SETTLING = 3  # steps that are not counted in the time of a step: caches fill, memory is allocated


class Clock(L.Callback):
    """Counts the seconds that a run trains, and ends it after the step in which `budget` seconds are spent.

    A step is timed from the end of what happens between steps (figures, pictures, checkpoints) until the averages have
    its weights, with the reading of its batch. The count is in the checkpoint, and a resumed run continues it. now:
    returns the time in seconds. at_least: the number of steps that are made however long they take.
    """

    def __init__(self, budget: float = math.inf, now: Callable[[], float] = time.perf_counter, *, at_least: int = 1):
        self.budget, self.now, self.at_least = budget, now, at_least
        self.seconds, self.steps, self._since = 0.0, 0, 0.0
        self._settled: tuple[int, float] | None = None
        self.restart = _Restart(self)

    @property
    def spent(self) -> bool:
        return self.seconds >= self.budget and self.steps >= self.at_least

    @property
    def step_seconds(self) -> float:
        """The mean time of a step, without the first few if there are more."""
        steps, seconds = self._settled or (0, 0.0)
        return (self.seconds - seconds) / max(self.steps - steps, 1)

    def on_train_start(self, trainer, module: DistillModule) -> None:
        self._since = self.now()

    def on_train_batch_end(self, trainer, module: DistillModule, outputs, batch, batch_idx) -> None:
        self.seconds += self.now() - self._since
        self.steps = trainer.global_step
        if self._settled is None and self.steps >= SETTLING:
            self._settled = (self.steps, self.seconds)
        if self.spent:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]


class _Restart(L.Callback):
    """The last of the callbacks: the time of the next step begins here."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, module: DistillModule, outputs, batch, batch_idx) -> None:
        self.clock._since = self.clock.now()
