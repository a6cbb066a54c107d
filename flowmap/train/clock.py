"""The clock of a run: seconds of training alone, and the end of the run when they are spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import lightning as L

from flowmap.train.module import DistillModule

SETTLING = 3  # steps that are not counted in the time of a step: caches fill, memory is taken


class Clock(L.Callback):
    """Counts the seconds that a run trains, and ends it cleanly after the step in which `budget` seconds are spent.

    A step is timed from the moment that all that comes between steps (figures, pictures, checkpoints) is done until the averages have taken
    it in: its batch is read within. The count is in the checkpoint, so a resumed run goes on with it. now: the time in seconds. at_least:
    steps that are made whatever they take.
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
        """The mean time of a step, the first few apart where there are more."""
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
    """The last of the callbacks: from here on the next step's time runs."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, module: DistillModule, outputs, batch, batch_idx) -> None:
        self.clock._since = self.clock.now()
