"""Count the calls of networks in one training step by taking one.

The step uses the recipe's own objective and times, with a student and a teacher that cost one matrix product a call;
the products are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.build.teacher import guided_by
from flowmap.estimate.flops import Flops
from flowmap.flow.types import Cond, Objective, Teacher, broadcast_time
from flowmap.objectives import Adversarial, RewardTuning
from flowmap.objectives.instaflow import Endpoint
from flowmap.objectives.rectified import LPIPSHuber, PseudoHuber, Rectified
from flowmap.recipe import Recipe
from flowmap.recipe.settings import ClassifierFree

ROWS, WIDTH = 1000, 8
UNIT = 2 * ROWS * WIDTH**2  # FLOPs of one call for every sample
WARM = 10**9  # A step after every warm-up.


@dataclass(frozen=True)
class Calls:
    """Calls for each sample of a step.

    forward: passes of the student (a tangent counts as one) and of the fake score. backward: backward passes. strong,
    weak: calls of the teacher and of its weak model.
    """

    forward: float
    backward: float
    strong: float
    weak: float


def calls_of(recipe: Recipe, *, conditional: bool) -> Calls:
    """Return the calls of a step after warm-up, counted over a thousand samples.

    The network of a perceptual distance is not counted, nor is a decoder before it.
    """
    if recipe.artifact != "student":
        return Calls(1, 1, 0, 0)
    matching = recipe.objective.matching
    student, strong, weak = _Student(), _Teacher(), _Teacher()
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, ROWS, WIDTH, generator=generator).unbind()
    t, s = recipe.times(ROWS, device=x0.device, generator=generator)
    cond: dict[str, Tensor] = {"class": torch.zeros(ROWS, dtype=torch.int64)} if conditional else {}
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    teacher: Teacher | None = None if recipe.teacher is None else strong
    if guidance is not None:
        low, high = guidance.scale
        cond["guidance"] = torch.linspace(low, high, ROWS)
        if isinstance(guidance, ClassifierFree):  # it costs no calls, and the samples here are no pictures
            guidance = replace(guidance, rescale_patch=None)
        teacher = guided_by(guidance, strong, weak)
    on_path = lambda x0: recipe.path.sample(x0, x1, t, s, cond or None)
    with Flops() as counter:
        loss = torch.zeros(())
        if recipe.distillation is not matching:
            loss = loss + without_networks(recipe.distillation)(student, teacher, on_path(x0), WARM).value
        if matching is not None:  # x0 stands for the student's samples
            loss = loss + matching.term(student, teacher, on_path(x0.clone().requires_grad_()), WARM).value
        forward = counter.count
        loss.backward()
    backward = counter.count - forward
    drawn, kept = sampling_calls(recipe)
    return Calls(forward / UNIT + drawn, backward / (2 * UNIT) + kept, strong.rows / ROWS, weak.rows / ROWS)


def late_share(recipe: Recipe) -> float:
    """The share of a run's steps in which its discriminator takes part; 1 without a late one."""
    begins = recipe.objective.discriminator_start if isinstance(recipe.objective, Adversarial) else 0
    return 1 - min(begins / recipe.trainer.steps, 1)


def sampling_calls(recipe: Recipe) -> tuple[float, float]:
    """Return forward and backward passes for the samples that a discriminator, a reward and a fake score need.

    The passes of the fake score are among them; the result is the mean over the numbers of steps, and over the steps
    of a run whose discriminator starts late.
    """
    forward = backward = 0.0
    if (drawing := drawn_by(recipe.objective)) is not None:
        forward, backward = (late_share(recipe) * calls for calls in drawing.sampling_calls)
    matching = recipe.objective.matching
    if matching is not None:
        forwards, backwards = matching.sampling_calls
        learns = matching.term.fake_steps
        forward += forwards + learns * (forwards + 1)
        backward += backwards + learns
    return forward, backward


def drawn_by(objective: Objective) -> Adversarial | RewardTuning | None:
    """The objective itself if it draws samples for a discriminator or a reward; otherwise None."""
    if isinstance(objective, Adversarial) or (isinstance(objective, RewardTuning) and objective.own_samples):
        return objective
    return None


def without_networks(objective):
    """Return the objective with a plain distance in place of a perceptual one, which needs a network's weights."""
    if isinstance(objective, Endpoint):
        return Endpoint()
    if isinstance(objective, Rectified) and isinstance(objective.distance, LPIPSHuber):
        return replace(objective, distance=PseudoHuber(objective.distance.scale))
    return objective


class _Student(nn.Module):
    """A flow map of one matrix that depends on x, t and s."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(WIDTH) / 2)
        # With a bias the input of the matrix has a gradient, as in a deep network.
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return F.linear(x + self.bias + broadcast_time(t, x) + broadcast_time(s, x) / 2, self.matrix)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return self.mean_velocity(x, t, s, cond).unsqueeze(1).expand(-1, 2, -1)

    def log_error(self, t: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return x + broadcast_time(s - t, x) * self.mean_velocity(x, t, s, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return self.mean_velocity(x, t, t, cond)


class _Teacher:
    """A velocity that costs nothing and counts the samples for which it is evaluated."""

    rows = 0

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        self.rows += len(x)
        return -x.detach()
