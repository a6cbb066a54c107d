"""Flow matching: on the diagonal s = t the student's mean velocity is the conditional velocity on average.

Source: Lipman et al. 2022, arXiv:2210.02747; this is how a teacher is trained.  Clock: 0 data, 1 noise.
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
    """The distance between F(xt, t, t) and v, the conditional velocity, or the teacher's where there is one; by default the mean square.

    weight: of each entry, by the variance that a learned prior gives it (1 under the Gaussian one); both velocities are multiplied by its
    root.
    """

    distance: Distance = Squared()
    weight: Weight = Unweighted()
    diagonal: ClassVar[bool] = True  # the arrival time plays no part

    def check(self, recipe: RecipeView) -> None:
        weighted = not isinstance(self.weight, Unweighted)
        if weighted and not (recipe.prior.learned and recipe.coupling.independent):
            raise ValueError(
                "objective.weight: is by the variance of a learned prior, on an independent coupling; allowed here: none"
            )

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        target = sample.vt if teacher is None else teacher.velocity(sample.xt, sample.t, sample.cond)
        velocity = student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond)
        target = target.detach()
        if sample.variance is not None and not isinstance(self.weight, Unweighted):
            root = self.weight(sample.variance).sqrt()
            velocity, target = root * velocity, root * target
        error = self.distance(velocity, target)
        return Loss(error.mean(), {"error": error.detach()})
