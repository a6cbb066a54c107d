"""MeanFlow: the Eulerian identity with the conditional velocity, which trains a flow map from data alone.

Sources: MeanFlow, Geng et al. 2025, arXiv:2505.13447 (tangent "target"); improved MeanFlow, Geng et al. 2025,
arXiv:2512.02012 (tangent "student": its regression of F + (t - s) sg(dF/dt) on v has this loss's value and gradient;
its extra head for v is not implemented). Clock: 0 data, 1 noise, as in the papers; their r is our s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.ranges import BelowOne, Positive, Share, check_ranges
from flowmap.flow.derivative import derivative_named, eulerian_derivative, without_graph
from flowmap.flow.distance import Adaptive, Distance
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time
from flowmap.objectives.ayf import off_diagonal


@dataclass(frozen=True)
class EulerianRegression(BaseObjective):
    """distance(F, sg(v - (t - s) R)), with v the conditional velocity, or the teacher's where there is one.

    R is the rate of F along v, or an estimate of it.
    tangent       the direction of R: "target", v itself, or "student", the student's own F(x, t, t), without noise
    omega, kappa  guidance in the target, v <- omega v + kappa F(x, t, t) + (1 - omega - kappa) F(x, t, t | no class),
                  where t is in `guided` and the sample has a class; the student learns the flow guided with scale
                  omega / (1 - kappa). (1, 0) is no guidance
    """

    distance: Distance = Adaptive()
    tangent: str = "target"
    omega: Positive = 1.0
    kappa: BelowOne = 0.0
    guided: tuple[Share, Share] = (0.0, 1.0)

    def __post_init__(self):
        check_ranges(self)
        if self.tangent not in ("target", "student"):
            raise ValueError(f"tangent: {self.tangent!r} is not one of target, student")
        if not self.guided[0] <= self.guided[1]:
            raise ValueError(f"guided: {self.guided} must be two rising times in [0, 1]")

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
        v = self._guided(student, sample, v).detach()
        direction = v if self.tangent == "target" else without_graph(student, x, t, t, cond)
        derive = lambda x, t, s, v, cond, rows: self._derive(student, x, t, s, v, cond, rows, step)
        mean_velocity, rate = off_diagonal(derive, student, sample, direction, needed=self._needed(step))
        target = v - broadcast_time(t - s, x) * rate
        target = self._limited(mean_velocity.detach(), target)
        residual = (mean_velocity.detach() - target).flatten(1).norm(dim=1)
        error = self.distance(mean_velocity, target)
        return Loss(error.mean(), {"residual_norm": residual, "tangent_norm": rate.flatten(1).norm(dim=1)})

    def _needed(self, step: int) -> bool:
        """Whether R differs from zero at this step."""
        return True

    def _derive(self, student: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond, rows: int, step: int):
        """(F with its graph, R in the first `rows` samples and zero in the rest), both shaped like x."""
        raise NotImplementedError

    def _limited(self, own: Tensor, target: Tensor) -> Tensor:
        """The target, from the student's own value and the identity's."""
        return target

    @property
    def null_weight(self) -> float:
        return 1 - self.omega - self.kappa

    def _guided(self, student: FlowMap, sample: PathSample, v: Tensor) -> Tensor:
        """v with the guidance of the student's own predictions with and without the class."""
        if (self.omega, self.kappa) == (1.0, 0.0):
            return v
        x, t, cond = sample.xt, sample.t, sample.cond
        if cond is None or "class" not in cond:
            what = "guidance in the target needs classes (data.conditional)"
            raise ValueError(f"objective.omega: {what}, and this data has none")
        given = without_graph(student, x, t, t, cond) if self.kappa else torch.zeros_like(v)
        dropped = without_graph(student, x, t, t, {**cond, "class": torch.full_like(cond["class"], -1)})
        mixed = self.omega * v + self.kappa * given + (1 - self.omega - self.kappa) * dropped
        inside = (t >= self.guided[0]) & (t <= self.guided[1]) & (cond["class"] >= 0)
        return torch.where(broadcast_time(inside, x), mixed, v)


@dataclass(frozen=True)
class MeanFlow(EulerianRegression):
    """distance(F, sg(v - (t - s) dF/dt)).

    distance      by default the paper's, |.|^2 / sg(|.|^2 + offset)^power
    derivative    "dual", "forward" or "difference"
    """

    derivative: str = "dual"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "derivative", derivative_named(self.derivative))

    def _derive(self, student: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond, rows: int, step: int):
        return eulerian_derivative(student, x, t, s, v, cond, mode=self.derivative, rows=rows)
