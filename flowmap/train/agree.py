"""All processes of a run agree, after each step, whether to save a checkpoint now and whether to end.

A signal (base/preempt.py) may reach one process alone, and only the first one looks at the clock. Each step starts a
reduction of one number on the CPU and reads that of the step before, so that no step waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning as L
import torch
from torch import distributed

from flowmap.base import preempt
from flowmap.base.preempt import Preempted
from flowmap.train.module import DistillModule

GO_ON, SAVE, END = 0, 1, 2


class Agree(L.Callback):
    """Has `due` set while the callbacks of a step run after which a checkpoint is saved; `ended` if the run ends there.

    minutes: save a checkpoint whenever the last one is older; None for never. at_once: the steps after which samples
    are drawn or measured, before which the processes wait for each other's answer: a run that ends there draws none.
    """

    def __init__(
        self,
        minutes: float | None = None,
        at_once: Callable[[int], bool] = lambda done: False,
        now: Callable[[], float] = time.monotonic,
    ):
        self.minutes, self.at_once, self.now = minutes, at_once, now
        self.due, self.ended, self._saved, self._seen = False, False, 0.0, -1
        self.keep: Callable[[], None] = lambda: None  # saves a checkpoint of this step, unless there is one
        self._wishes: torch.Tensor | None = None
        self._work: distributed.Work | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved, self._seen, self._work = self.now(), trainer.global_step, None
        preempt.take()  # Lightning has just set handlers, which broadcast inside a signal handler
        # Lightning 2.6 also broadcasts before each batch whether SIGTERM has arrived, and waits for the GPU
        setattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010

    def on_train_batch_end(self, trainer: L.Trainer, module: DistillModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self._seen:  # a micro-batch
            return
        self._seen = trainer.global_step
        late = self.minutes is not None and self.now() - self._saved >= 60 * self.minutes
        self.follow(trainer, self._agreed(END if preempt.requested() else SAVE if late else GO_ON, trainer))

    def follow(self, trainer: L.Trainer, agreed: int) -> None:
        """Save a checkpoint after this step, or save and end."""
        self.due = agreed >= SAVE
        if self.due:
            self._saved = self.now()
        if agreed == END:
            self.ended = trainer.should_stop = True

    def saved(self) -> None:
        """A checkpoint has been saved for another reason."""
        self._saved = self.now()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._answer()

    def _agreed(self, wish: int, trainer: L.Trainer) -> int:
        """The largest wish of all processes; with several, of the step before."""
        if trainer.world_size == 1:
            return wish
        wish = GO_ON if wish == SAVE and not trainer.is_global_zero else wish  # one clock, the first process's
        agreed = self._answer()
        self._wishes = torch.tensor(wish)
        self._work = distributed.all_reduce(self._wishes, distributed.ReduceOp.MAX, async_op=True)
        return max(agreed, self._answer()) if self.at_once(self._seen) else agreed

    def _answer(self) -> int:
        """The result of the reduction that has been started, if one has."""
        if self._work is None or self._wishes is None:
            return GO_ON
        self._work.wait()
        self._work = None
        return int(self._wishes)


def agreement(trainer: L.Trainer) -> Agree:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Agree))


def interruptible(trainer: L.Trainer, look: Callable[[], None]) -> None:
    """Call look(), which a signal interrupts; the run then ends after this step, with a checkpoint of it.

    Several processes, which are in different places when the signal arrives, save that checkpoint before look() and end
    at once.
    """
    if trainer.world_size > 1:
        agreement(trainer).keep()
    try:
        with preempt.released():
            look()
    except Preempted:
        if trainer.world_size > 1:
            raise
        preempt.postpone()
        agreement(trainer).follow(trainer, END)
