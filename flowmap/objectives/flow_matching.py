"""Flow matching: on the diagonal s = t the student's mean velocity equals the mean of the conditional velocity.

Source: Lipman et al. 2022, arXiv:2210.02747; teachers are trained with it. Clock: 0 data, 1 noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowmap.flow.distance import Distance, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, RecipeView, Teacher
from flowmap.objectives.lediflow import Unweighted, Weight


@dataclass(frozen=True)
class FlowMatching(BaseObjective):
    """The distance, by default the mean square, between F(xt, t, t) and the conditional or the teacher's velocity.

    weight: the weight of each entry, from the variance that a learned prior gives it (1 under the Gaussian prior). Both
    velocities are multiplied by its square root.
    """

    distance: Distance = Squared()
    weight: Weight = Unweighted()
    diagonal: ClassVar[bool] = True  # the arrival time plays no part

    def check(self, recipe: RecipeView) -> None:
        weighted = not isinstance(self.weight, Unweighted)
        if weighted and not (recipe.prior.learned and recipe.coupling.independent):
            needed = "the variance of a learned prior, on an independent coupling"
            raise ValueError(f"objective.weight: needs {needed}; allowed here: none")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        target = sample.vt if teacher is None else teacher.velocity(sample.xt, sample.t, sample.cond)
        velocity = student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond)
        target = target.detach()
        if sample.variance is not None and not isinstance(self.weight, Unweighted):
            root = self.weight(sample.variance).sqrt()
            velocity, target = root * velocity, root * target
        error = self.distance(velocity, target)
        return Loss(error.mean(), {"error": error.detach()})
