"""The term reverse_kl: a second network, the fake score, learns the velocity of the student's samples.

Source: DMD2, Yin et al. 2024, arXiv:2405.14867, without its discriminator. The fake learns by flow matching while the
student trains (flowmap/train/auxiliary.py). The gradient is that of matching.py, with w the fake's velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from flowmap.base.ranges import Range, Rate, check_ranges
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher
from flowmap.objectives.flow_matching import FlowMatching
from flowmap.objectives.matching import descend, velocity_of

FakeSteps = Annotated[int, Range(1, 1000)]


@dataclass(frozen=True)
class ReverseKL:
    """The samples descend the difference between the fake's prediction and the teacher's.

    fake_steps: the fake's steps before each step of the student, each on new samples (the paper: 5 on ImageNet-64).
    normalised: whether the gradient is divided by its denominator (matching.py). fake_lr: the fake's learning rate, by
    default the optimizer's; it follows the student's schedule. by_jump: whether the fake is told at which time the
    sample's last jump departed; without it the fake learns the mixture of all jumps' laws, as the paper's does.
    """

    fake_steps: FakeSteps = 5
    normalised: bool = True
    fake_lr: Rate | None = None
    by_jump: bool = True
    intervals: ClassVar[bool] = False
    twin: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, network: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        teacher = velocity_of(teacher, "reverse_kl")
        x, t, cond = sample.xt.detach(), sample.t, sample.cond
        with torch.no_grad():
            real, fake = teacher.velocity(x, t, cond), network.mean_velocity(x, t, t, cond)
        return descend(sample, real, fake, normalised=self.normalised)

    def learn(self, fake: FlowMap, sample: PathSample) -> Loss:
        return FlowMatching()(fake, None, sample, 0)
