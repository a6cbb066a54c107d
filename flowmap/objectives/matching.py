"""What distribution-matching terms share: the direction in which a sample of the student should move.

Source: DMD, Yin et al. 2023, arXiv:2311.18828, without the paper's factor alpha_t = 1 - t. Clock: 0 data, 1 noise. A
sample x0 of the student is noised, xt = (1 - t) x0 + t noise. There v is the teacher's velocity and w the fake one:
that of the law of the student's samples, E[noise - x0 | xt]. The two velocities differ as the two scores do,
v - w = t / (1 - t) (score of the student - score of the teacher), so the reverse KL divergence falls along -g:

    g = (x0^fake - x0^real) / mean|x0 - x0^real| = t (v - w) / mean|x0 - (xt - t v)|        x0^ = xt - t velocity
    loss = || x0 - sg(x0 - g) ||^2 / (2 D)                                                   its gradient in x0 is g / D

Terms differ in what they take for w.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from flowmap.flow.distance import gradient_as_target
from flowmap.flow.types import Cond, FlowMap, Loss, PathSample, RecipeView, Teacher, broadcast_time

LEAST = 1e-6  # of the mean that g is divided by
NO_TEACHER = "teacher: {} compares with a teacher's velocity; add a teacher"


class Samples(NamedTuple):
    """Samples x0 of the student, with a graph, their number of jumps, and the time at which the last one departed."""

    x0: Tensor
    jumps: int
    departure: float


class Term(Protocol):
    """A loss of the student's samples: reverse_kl.py, self_fake.py, mean_velocity_match.py, twin.py.

    fake_steps: the steps of the fake score network before each step of the student; 0: the term has none. fake_lr: its
    learning rate, None for the optimizer's. by_jump: whether it learns a law for each jump (`OfJump`).
    intervals: whether the term compares over intervals [s, t], not at single times. twin: whether the student itself
    gives both velocities, by its interval input, so that no teacher is needed.
    """

    @property
    def fake_steps(self) -> int: ...

    @property
    def fake_lr(self) -> float | None: ...

    @property
    def by_jump(self) -> bool: ...

    @property
    def intervals(self) -> bool: ...

    @property
    def twin(self) -> bool: ...

    def __call__(self, network: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        """The student's loss, through sample.x0, its samples with their graph.

        network: the fake score network, or the student if the term has none; it gets no gradient, but for a twin.
        """
        ...

    def learn(self, fake: FlowMap, sample: PathSample) -> Loss:
        """The loss of the fake score network on samples of the student without their graph."""
        ...


class WithoutFake:
    """What terms without a fake score network share; they compare at single times."""

    fake_steps: ClassVar[int] = 0
    fake_lr: ClassVar[None] = None
    by_jump: ClassVar[bool] = False
    intervals: ClassVar[bool] = False
    twin: ClassVar[bool] = False

    def learn(self, fake: FlowMap, sample: PathSample) -> Loss:
        raise AssertionError(f"{type(self).__name__} has no network of its own")


class OfJump:
    """A fake score network as the velocity of the samples whose last jump departed at that time.

    The network's input for the arrival time names the jump: it embeds t - s, and here t - s = 1 - departure. One
    velocity for the samples of all jumps would be that of their mixture, and the student's gradient would vanish as
    soon as the mixture has the teacher's law, whatever the law of each.
    """

    def __init__(self, fake: FlowMap, departure: float):
        self.fake, self.departure = fake, departure

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return self.fake.mean_velocity(x, t, s - (1 - self.departure), cond)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        raise NotImplementedError("a fake score is a velocity, not a flow map")


def descend(sample: PathSample, real: Tensor, fake: Tensor, *, normalised: bool) -> Loss:
    """The loss whose gradient in sample.x0 is g / D, for velocities (B, ...) of teacher and student at sample.xt.

    normalised: whether g is divided by its denominator.
    """
    x = sample.xt.detach()
    with torch.no_grad():
        g = broadcast_time(sample.t, x) * (real - fake)
        away = (sample.x0 - (x - broadcast_time(sample.t, x) * real)).abs().flatten(1).mean(1)
        direction = g / broadcast_time(away.clamp_min(LEAST), g) if normalised else g
    loss = gradient_as_target(sample.x0, direction.to(sample.x0.dtype)) / (2 * x[0].numel())
    return Loss(loss.mean(), {"residual_norm": g.flatten(1).norm(dim=1), "distance_to_teacher": away})


def velocity_of(teacher: Teacher | None, kind: str) -> Teacher:
    """The teacher; raises ValueError if there is none."""
    if teacher is None:
        raise ValueError(NO_TEACHER.format(kind))
    return teacher


def check_samples(recipe: RecipeView, kind: str, *, needs_teacher: bool = True) -> None:
    """Raise ValueError where the law of the student's samples cannot be compared with the teacher's, or the data's."""
    if recipe.teacher is None and needs_teacher:
        raise ValueError(NO_TEACHER.format(kind))
    if recipe.trainer.strategy == "fsdp":
        raise ValueError(f"trainer.strategy: 'fsdp' cannot shard the fake of {kind}; use ddp")
    if not recipe.coupling.independent:
        raise ValueError(f"coupling: {kind} compares laws, not pairs: its samples start at noise; leave it independent")
    if recipe.prior.learned:
        raise ValueError(f"prior: {kind} adds noise from N(0, I) to its samples; leave it gaussian")
