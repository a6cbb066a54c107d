"""What objectives that draw the student's samples in a few steps share."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmap.flow.draws import Generator, one_of
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import Cond, FlowMap, Sampler


class DrawingObjective(BaseObjective):
    """An objective with the settings `steps`, of which each training step draws one, and `through`."""

    steps: tuple[int, ...]
    through: str

    @property
    def draws_samples(self) -> bool:
        return True

    def check_drawing(self) -> None:
        """Raise ValueError unless `steps` has one at least and `through` is "last" or "all"."""
        if not self.steps:
            raise ValueError(f"steps: {self.steps} must be whole numbers from 1, at least one")
        if self.through not in ("last", "all"):
            raise ValueError(f"through: {self.through!r} is not one of last, all")

    def drawn_steps(self, generator: Generator) -> int:
        """One of `steps`."""
        return self.steps[one_of(len(self.steps), generator)]

    def generated(
        self, sampler: Sampler, student: FlowMap, x1: Tensor, cond: Cond | None, generator: Generator
    ) -> tuple[Tensor, int]:
        """The student's samples from x1, with the graph that `through` says, and their number of steps."""
        steps = self.drawn_steps(generator)
        x0 = generate(sampler, student, x1, cond, steps=steps, generator=generator, through=self.through)
        return x0, steps

    @property
    def graphs(self) -> int:
        """How many calls of the student keep their graph, at most."""
        return max(self.steps) if self.through == "all" else 1

    @property
    def sampling_calls(self) -> tuple[float, float]:
        """Forward and backward passes of the student for one sample, the mean over `steps`."""
        mean = sum(self.steps) / len(self.steps)
        return mean, mean if self.through == "all" else 1


def generate(
    sampler: Sampler, student: FlowMap, x1: Tensor, cond: Cond | None, *, steps: int, generator: Generator, through: str
) -> Tensor:
    """The student's sample from x1 in `steps` calls, with the graph of its last call or of all."""
    called = student if through == "all" else _LastCall(student, steps)
    return sampler(called, x1, cond, steps=steps, generator=generator)


class _LastCall:
    """A flow map that keeps the graph of its num_calls-th call only."""

    def __init__(self, student: FlowMap, num_calls: int):
        self.student, self.left = student, num_calls

    def _graph(self) -> torch.set_grad_enabled:
        self.left -= 1
        return torch.set_grad_enabled(self.left == 0 and torch.is_grad_enabled())

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        with self._graph():
            return self.student(x, t, s, cond)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        with self._graph():
            return self.student.mean_velocity(x, t, s, cond)
