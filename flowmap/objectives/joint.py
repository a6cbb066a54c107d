"""Joint training: a flow-map objective, and a term that matches the law of the student's own samples, in one run.

Source: rCM, Zheng et al. 2025, arXiv:2510.08431 (consistency plus the reverse KL divergence of DMD); AnyFlow and
FSF-DMD, arXiv:2605.19256, add such terms to flow maps. The flow-map loss covers the data's law and adds small errors
up over a jump; the term sees the sample at the end of the jump.

    loss = loss of base + lambda(step) * term of x0         x0 the student's sample in 1 to k steps from noise
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.base.ranges import Calls, CountFromZero, FromZero, check_ranges
from flowmap.flow.draws import Generator
from flowmap.flow.parts import BaseObjective, complete
from flowmap.flow.times import Uniform
from flowmap.flow.types import Cond, FlowMap, Loss, Objective, PathSample, RecipeView, Sampler, Teacher, TimeSampler
from flowmap.objectives.drawing import DrawingObjective
from flowmap.objectives.matching import Samples, Term, check_samples


@dataclass(frozen=True)
class Joint(DrawingObjective):
    """The loss of `base` plus lambda times that of `term`.

    weight        lambda, after its warm-up
    start         the step before which the base trains alone, and nothing of the term is computed
    warmup_steps  over which lambda rises linearly from 0
    steps         the step counts of the samples; each training step draws one of them
    through       whether the gradient of a sample passes through its "last" jump or through "all"
    times         at which the samples are noised and the velocities compared, by default uniform: single times, or
                  pairs for a term of intervals; the recipe's times are the base's

    A discriminator is a third loss: {kind: adversarial, base: {kind: joint, ...}, ...}.
    """

    base: Objective
    term: Term
    weight: FromZero = 1.0
    start: CountFromZero = 0
    warmup_steps: CountFromZero = 0
    steps: tuple[Calls, ...] = (1, 2, 4)
    through: str = "last"
    times: TimeSampler | None = None

    def __post_init__(self):
        check_ranges(self)
        complete(type(self.base), BaseObjective)
        self.check_drawing()

    @property
    def diagonal(self) -> bool:  # type: ignore[override]  # a constant of other kinds
        return self.base.diagonal

    @property
    def distillation(self) -> Objective:
        return self.base

    @property
    def matching(self) -> Joint:
        return self

    def check(self, recipe: RecipeView) -> None:
        check_samples(recipe, "objective joint", needs_teacher=not self.term.twin)
        if self.term.twin and self.base.diagonal:
            raise ValueError("objective.base: trains velocities alone, without the input that the twin needs")
        if self.base.artifact != "student" or self.base.draws_samples:
            raise ValueError("objective.base: must be an objective that trains a flow map and draws no samples")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The base's loss alone; train/auxiliary.py adds the term's."""
        return self.base(student, teacher, sample, step)

    def weight_at(self, step: int) -> float:
        """lambda at that step."""
        if step < self.start:
            return 0.0
        rise = (step - self.start + 1) / (self.warmup_steps + 1)
        return self.weight * min(1.0, rise)

    def times_of(self, recipe_times: TimeSampler) -> TimeSampler:
        return self.times or Uniform(pairs="sorted" if self.term.intervals else "diagonal")

    def samples(
        self, sampler: Sampler, student: FlowMap, x1: Tensor, cond: Cond | None, generator: Generator
    ) -> Samples:
        """The student's samples from x1, with the graph that `through` says."""
        x0, steps = self.generated(sampler, student, x1, cond, generator)
        return Samples(x0, steps, sampler.times(steps)[-2])
