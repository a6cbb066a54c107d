"""sCM: continuous-time consistency, every sample to the data (s = 0), with TrigFlow's weights.

Source: Lu, Song 2024, arXiv:2410.11081 (algorithm 1); distillation (sCD) with a teacher, training (sCT) without one.
Clock: 0 data, 1 noise. With A^2 = t^2 + (1 - t)^2 d^2 and d = sigma_data, TrigFlow's angle a has cos a = (1 - t) d / A
and sin a = t / A, its state is d x / A, and its network is (A / d) F + ((1 - t) d^2 - t) x / (A d). On our clock and
linear path this gives exactly

    d f / d a = -(A^2 / d) (F - v + t dF/dt)
    g = -cos^2 a A (F - v)  -  r [ (1 - t) A (F - v + t dF/dt) - cos^2 a A (F - v) ]      = cos a df/da at r = 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.base.ranges import Positive, Share
from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.distance import gradient_as_target, normalise
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time
from flowmap.objectives.tangent import Tangent
from flowmap.objectives.uncertainty import EvenWeight, TimeWeight


@dataclass(frozen=True)
class SCM(Tangent):
    """|| N - sg(N + g / (||g|| + c)) ||^2 / D, with N the network as TrigFlow has it and D the number of elements of a
    sample.

    sigma_data    the data's standard deviation
    weight        {kind: learned} is the paper's exp(w(t)), with w = -u; it has little effect once g is normalised

    r weighs every term with a derivative. The sample's arrival time is not used. At t = 1 exactly, g is zero, as in
    TrigFlow: such samples have no gradient.
    """

    r_max: Share = 1.0
    sigma_data: Positive = 0.5
    weight: TimeWeight = EvenWeight()

    @property
    def learns_weight(self) -> bool:
        return self.weight.learned

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, cond = sample.xt, sample.t, sample.cond
        v = sample.vt if teacher is None else teacher.velocity(x, t, cond)
        mean_velocity, rate = eulerian_derivative(student, x, t, torch.zeros_like(t), v, cond, mode=self.derivative)
        radius, cos2 = self._radius_and_cos2(t)
        r = self.tangent_weight(step)
        pull = mean_velocity.detach() - v
        whole = broadcast_time(1 - t, x) * (pull + broadcast_time(t, x) * rate)
        g = -broadcast_time(radius, x) * ((1 - r) * broadcast_time(cos2, x) * pull + r * whole)
        # what TrigFlow adds to it has no gradient
        network = broadcast_time(radius / self.sigma_data, x) * mean_velocity
        error = gradient_as_target(network, -normalise(g, c=self.c, norm=self.norm)) / x[0].numel()
        loss = self.weight(error, student, t, torch.zeros_like(t))
        logs = {"residual_norm": g.flatten(1).norm(dim=1), "tangent_norm": rate.flatten(1).norm(dim=1)}
        logs |= {"tangent_weight": torch.tensor(r), "error": error}
        return Loss(loss.mean(), {key: value.detach() for key, value in logs.items()})

    def _radius_and_cos2(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A and cos^2 a, both (B,)."""
        radius = torch.hypot(t, (1 - t) * self.sigma_data)
        return radius, ((1 - t) * self.sigma_data / radius) ** 2
