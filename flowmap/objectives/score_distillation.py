"""Score distillation: match the distribution of the student's few-step samples to the teacher's by the difference of
scores.

Source: DMD2, Yin et al. 2024, arXiv:2405.14867. The gradient and its weight are DMD's, Yin et al. 2023,
arXiv:2311.18828, without the paper's factor alpha_t = 1 - t. Clock: 0 data, 1 noise. A second network, the fake, learns
the velocity of the student's own samples by flow matching while the student trains (flowmap/train/auxiliary.py). For a
sample x0 carried to a time t with fresh noise, with v the teacher's and w the fake's velocity there,

    g = (x0^fake - x0^real) / mean|x0 - x0^real| = t (v - w) / mean|x0 - (xt - t v)|        x0^ = xt - t velocity
    loss = || x0 - sg(x0 - g) ||^2 / (2 D)                                                   its gradient in x0 is g / D
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowmap.base.ranges import Calls, Range, Rate, check_ranges
from flowmap.flow.distance import gradient_as_target
from flowmap.flow.draws import Generator, one_of
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import Cond, FlowMap, Loss, PathSample, RecipeView, Sampler, Teacher, broadcast_time
from flowmap.objectives.flow_matching import FlowMatching

LEAST = 1e-6  # of the mean that g is divided by


@dataclass(frozen=True)
class ScoreDistillation(BaseObjective):
    """The student's samples descend the difference between the fake's prediction and the teacher's.

    steps         the step counts of the samples; each training step draws one of them
    fake_steps    the fake's steps before each step of the student, each on new samples (the paper: 5 on ImageNet-64)
    through       "last": a run stops at one of its jumps, drawn at random, whose arrival is the sample and whose graph
                  carries the gradient (the paper's backward simulation; every jump must go to the data, as with sampler
                  gamma 1); "all": whole runs, with the gradient of all jumps
    normalised    whether g is divided by its denominator
    fake_lr       the fake's learning rate, by default the optimizer's; it follows the student's schedule

    The recipe's times are those at which both networks are evaluated. Its data supplies conditions only.
    """

    steps: tuple[Calls, ...] = (1, 2, 4)
    fake_steps: Annotated[int, Range(1, 1000)] = 5
    through: str = "last"
    normalised: bool = True
    fake_lr: Rate | None = None

    def __post_init__(self):
        check_ranges(self)
        if not self.steps:
            raise ValueError(f"steps: {self.steps} must be whole numbers from 1, at least one")
        if self.through not in ("last", "all"):
            raise ValueError(f"through: {self.through!r} is not one of last, all")

    @property
    def draws_samples(self) -> bool:
        return True

    def check(self, recipe: RecipeView) -> None:
        if recipe.teacher is None:
            raise ValueError("teacher: objective score_distillation compares with a teacher's velocity; add a teacher")
        if recipe.trainer.strategy == "fsdp":
            raise ValueError("trainer.strategy: 'fsdp' cannot shard the fake of score_distillation; use ddp")
        if not recipe.coupling.independent:
            why = "compares laws, not pairs: its samples start at noise"
            raise ValueError(f"coupling: objective score_distillation {why}; leave it independent")
        if recipe.prior.learned:
            why = "adds noise from N(0, I) to its samples"
            raise ValueError(f"prior: objective score_distillation {why}; leave it gaussian")
        if self.through == "last" and max(self.steps) > 1 and not recipe.sampler.jumps_to_data:
            allowed = "allowed: 'all', or sampler {kind: gamma, gamma: 1}"
            raise ValueError(f"{recipe.key}.through: 'last' trains jumps to the data alone; {allowed}")

    def __call__(self, fake: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The student's loss, through sample.x0, its samples with their graph. `fake` takes the place of the student
        and gets no grad.
        """
        if teacher is None:
            raise ValueError(
                "objective.kind: score_distillation compares with the teacher's velocity, so the recipe needs a teacher"
            )
        x, t, cond = sample.xt.detach(), sample.t, sample.cond
        with torch.no_grad():
            real, other = teacher.velocity(x, t, cond), fake.mean_velocity(x, t, t, cond)
            g = broadcast_time(t, x) * (real - other)
            away = (sample.x0 - (x - broadcast_time(t, x) * real)).abs().flatten(1).mean(1)
            direction = g / broadcast_time(away.clamp_min(LEAST), g) if self.normalised else g
        loss = gradient_as_target(sample.x0, direction.to(sample.x0.dtype)) / (2 * x[0].numel())
        return Loss(loss.mean(), {"residual_norm": g.flatten(1).norm(dim=1), "distance_to_teacher": away})

    def learn(self, fake: FlowMap, sample: PathSample) -> Loss:
        """The fake's loss: flow matching on samples of the student, sample.x0 without their graph."""
        return FlowMatching()(fake, None, sample, 0)

    def samples(
        self, sampler: Sampler, student: FlowMap, x1: Tensor, cond: Cond | None, generator: Generator
    ) -> tuple[Tensor, int]:
        """Return the student's samples from x1, as `through` requires, and their number of jumps."""
        num_steps = self.steps[one_of(len(self.steps), generator)]
        if self.through == "all":
            return sampler(student, x1, cond, steps=num_steps, generator=generator), num_steps
        stopped = Stopped(student, 1 + one_of(num_steps, generator))
        sampler(stopped, x1, cond, steps=num_steps, generator=generator)
        return stopped.arrival, stopped.at


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
