"""Score distillation: match the distribution of the student's few-step samples to the teacher's by the difference of
scores, without any other loss.

Source: DMD2, Yin et al. 2024, arXiv:2405.14867. Its gradient is that of the term reverse_kl (reverse_kl.py,
matching.py); its samples are drawn by the paper's backward simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Rate, check_ranges
from flowmap.base.schema import added
from flowmap.flow.draws import Generator, one_of
from flowmap.flow.types import Cond, FlowMap, Loss, PathSample, RecipeView, Sampler, Teacher, TimeSampler
from flowmap.objectives.drawing import DrawingObjective
from flowmap.objectives.matching import Samples, check_samples
from flowmap.objectives.reverse_kl import FakeSteps, ReverseKL


@dataclass(frozen=True)
class ScoreDistillation(DrawingObjective):
    """The student's samples descend the difference between the fake's prediction and the teacher's.

    steps         the step counts of the samples; each training step draws one of them
    fake_steps    the fake's steps before each step of the student, each on new samples (the paper: 5 on ImageNet-64)
    through       "last": a run stops at one of its jumps, drawn at random, whose arrival is the sample and whose graph
                  carries the gradient (the paper's backward simulation; every jump must go to the data, as with sampler
                  gamma 1); "all": whole runs, with the gradient of all jumps
    normalised    whether g is divided by its denominator
    fake_lr       the fake's learning rate, by default the optimizer's; it follows the student's schedule
    by_jump       whether the fake is told which jump made the samples (reverse_kl.py)

    The recipe's times are those at which both networks are evaluated. Its data supplies conditions only.
    """

    steps: tuple[Calls, ...] = (1, 2, 4)
    fake_steps: FakeSteps = 5
    through: str = "last"
    normalised: bool = True
    fake_lr: Rate | None = None
    by_jump: bool = added(False)
    base: ClassVar[None] = None

    def __post_init__(self):
        check_ranges(self)
        self.check_drawing()

    @property
    def matching(self) -> ScoreDistillation:
        return self

    @property
    def term(self) -> ReverseKL:
        return ReverseKL(self.fake_steps, self.normalised, self.fake_lr, self.by_jump)

    def check(self, recipe: RecipeView) -> None:
        check_samples(recipe, "objective score_distillation")
        if self.through == "last" and max(self.steps) > 1 and not recipe.sampler.jumps_to_data:
            allowed = "allowed: 'all', or sampler {kind: gamma, gamma: 1}"
            raise ValueError(f"{recipe.key}.through: 'last' trains jumps to the data alone; {allowed}")

    def __call__(self, fake: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The student's loss, through sample.x0, its samples with their graph. `fake` takes the place of the student
        and gets no grad.
        """
        return self.term(fake, teacher, sample, step)

    def weight_at(self, step: int) -> float:
        return 1.0

    def times_of(self, recipe_times: TimeSampler) -> TimeSampler:
        return recipe_times

    def samples(
        self, sampler: Sampler, student: FlowMap, x1: Tensor, cond: Cond | None, generator: Generator
    ) -> Samples:
        """Return the student's samples from x1, as `through` requires."""
        num_steps = self.drawn_steps(generator)
        times = sampler.times(num_steps)
        if self.through == "all":
            x0 = sampler(student, x1, cond, steps=num_steps, generator=generator)
            return Samples(x0, num_steps, times[-2])
        stopped = Stopped(student, 1 + one_of(num_steps, generator))
        sampler(stopped, x1, cond, steps=num_steps, generator=generator)
        return Samples(stopped.arrival, stopped.at, times[stopped.at - 1])

    @property
    def sampling_calls(self) -> tuple[float, float]:
        """Forward and backward passes of the student for one sample, the mean over `steps`."""
        stopped = sum((k + 1) / 2 for k in self.steps) / len(self.steps), 1
        return stopped if self.through == "last" else super().sampling_calls


class Stopped:
    """A flow map for one run of a sampler: `arrival` is the result of call number `at`, with its graph.

    Later calls cost nothing.
    """

    def __init__(self, student: FlowMap, at: int):
        self.student, self.at, self.calls = student, at, 0

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        self.calls += 1
        if self.calls > self.at:
            return x
        with torch.set_grad_enabled(self.calls == self.at and torch.is_grad_enabled()):
            self.arrival = self.student(x, t, s, cond)
        return self.arrival.detach()

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        raise NotImplementedError("a sampler of jumps asks for arrivals alone")
