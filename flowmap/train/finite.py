"""Whether losses and gradients stay finite, checked on the device and read every so many steps.

The host waits for the device only when it reads the result. It does so, and checks the weights, before checkpoints,
students and snapshots are written (callbacks.check_weights), so none of them has a NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 2**62


class NotFinite(RuntimeError):
    """The loss or a weight became NaN or infinite: the run stops here."""


class FiniteChecks:
    """The first value that was not finite, as a number on the device, until it is asked for.

    every: the number of steps after which it is due.
    """

    def __init__(self, every: int):
        self.every = every
        self._names: list[str] = []
        self._first: Tensor | None = None

    def note(self, what: str, value: Tensor, step: int) -> None:
        """Check a scalar of training step `step`; nothing waits."""
        if what not in self._names:
            self._names.append(what)
        code = step * 1000 + self._names.index(what)
        found = torch.where(torch.isfinite(value), NEVER, code)
        self._first = found if self._first is None else torch.minimum(self._first, found)

    def due(self, done: int | None) -> bool:
        return self._first is not None and (done is None or done % self.every == 0)

    def found(self, world_size: int) -> tuple[str, int] | None:
        """The name and the step of the first value that was not finite, on any process; then it starts over."""
        assert self._first is not None, "it is due"
        first, self._first = self._first, None
        if world_size > 1:
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        code = int(first)
        return None if code == NEVER else (self._names[code % 1000], code // 1000)
