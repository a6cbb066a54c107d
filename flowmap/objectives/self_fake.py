"""The term self_fake: the student's own map gives the velocity of its samples, so that there is no fake network.

Source: FSF-DMD, Kim, Lee, Park 2026, arXiv:2605.19256, of which only the abstract was at hand: "the endpoint
pseudo-velocity of a flow-map generator" replaces the fake network. What follows is derived here, not taken from there.
If f(x, t, 0) is the map of a flow, the velocity w of that flow leaves the end point where it is:
df/dt along w = 0. Along the teacher's velocity v instead, with F the mean velocity over [0, t],

    w~ = F + t dF/dt                          the derivative along v, as in the Eulerian identity
    v - w~ = (df/dx) (v - w)                  since df/dt along v = (df/dx) (v - w) = v - F - t dF/dt

so w~ = v exactly where w = v, and elsewhere v - w~ is v - w as the end point feels it. If f is the flow map of its own
samples' law, w is the fake velocity; while f still trains it is a surrogate. The loss is that of matching.py with w~.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flowmap.flow.derivative import derivative_named, eulerian_derivative
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher, broadcast_time
from flowmap.objectives.matching import WithoutFake, descend, velocity_of


@dataclass(frozen=True)
class SelfFake(WithoutFake):
    """The samples descend the difference between the student's own end-point velocity and the teacher's.

    normalised: as of reverse_kl. derivative: how d/dt is computed (flow/derivative.py).
    """

    normalised: bool = True
    derivative: str = "dual"

    def __post_init__(self):
        object.__setattr__(self, "derivative", derivative_named(self.derivative))

    def __call__(self, network: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        teacher = velocity_of(teacher, "self_fake")
        x, t, cond = sample.xt.detach(), sample.t, sample.cond
        with torch.no_grad():
            real = teacher.velocity(x, t, cond)
            mean, rate = eulerian_derivative(network, x, t, torch.zeros_like(t), real, cond, mode=self.derivative)
        return descend(sample, real, mean + broadcast_time(t, x) * rate, normalised=self.normalised)
