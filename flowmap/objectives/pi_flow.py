"""pi-Flow: the network gives a policy, which leads through many times without it, and imitates the teacher there.

Source: Chen et al. 2025, arXiv:2510.14974 (imitation distillation with the DX policy; flow/policy.py). From (x, t) the
student's own policy leads to the states y at times tau in [s, t]. There its velocity must be the teacher's:

    loss = distance( (sg(y) - x0(tau)) / tau, v(sg(y), tau) )

The states carry no gradient, so the loss is flow matching on the student's own trajectory: no derivative of the network
and no discriminator. If the loss is zero the policy's ODE is the teacher's, and the student is its flow map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.ranges import Range, check_ranges
from flowmap.flow.distance import Distance, Squared
from flowmap.flow.parts import BaseObjective
from flowmap.flow.policy import hats, mixed, ratio, state, weights
from flowmap.flow.types import Cond, FlowMap, Loss, PathSample, Teacher, broadcast_time
from flowmap.objectives.self_distilled import spread

LEAST = 1 / 128  # the least time tau, where t is later: 1 / tau weighs the error of the data


@runtime_checkable
class GivesPolicy(Protocol):
    """A student that also gives the velocities u_k (B, K, ...) of its policy."""

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor: ...


@dataclass(frozen=True)
class PiFlow(BaseObjective):
    """The policy's velocity is the teacher's, at `states` points of each of its own trajectories.

    states      each a call of the teacher; their times are evenly spread over [s, t] and over the samples of the run
    distance    of the two velocities

    It wants a student with student.points of 2 or more. Here the interval [s, t] is an input, drawn by the recipe's
    times, where the paper trains one number of steps. Its GMFlow policy, its dropout of the policy's parts and its
    mixture of the teacher's trajectory with the student's are not implemented.
    """

    states: Annotated[int, Range(1, 64)] = 2
    distance: Distance = Squared()

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        if teacher is None:
            raise ValueError("objective.kind: pi_flow imitates a teacher's velocity; add a teacher")
        assert isinstance(student, GivesPolicy)
        x, t, s, cond = sample.xt, sample.t, sample.s, sample.cond
        u = student.policy(x, t, s, cond)
        first, errors = spread(sample.places(step), t.double()), []
        for i in range(self.states):
            at = _times((first + i / self.states) % 1, t, s)
            y = state(x, u.detach(), t, s, at)
            target = teacher.velocity(y, (at * t).to(t.dtype), cond).detach()
            errors.append(self.distance(policy_velocity(u, t, s, at), target))
        error = torch.stack(errors).mean(0)
        return Loss(error.mean(), {"error": error.detach()})


def _times(share: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """tau / t (B,) in float64 at that share of the way from t to s, with tau >= LEAST or tau = t."""
    least = (LEAST / t.double().clamp_min(LEAST)).clamp_max(1)
    return torch.maximum(1 - share * (1 - ratio(s, t)), least)


def policy_velocity(u: Tensor, t: Tensor, s: Tensor, at: Tensor) -> Tensor:
    """pi(sg(y), tau) for tau / t = at: with its graph through x0(tau), and none through the state y."""
    r, num_points = ratio(s, t), u.shape[1]
    predicted, moved = mixed(hats(at, r, num_points), u), mixed(weights(at, r, num_points), u.detach())
    return ((predicted - moved) / broadcast_time(at.to(t.dtype), predicted)).to(u.dtype)
