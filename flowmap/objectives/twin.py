"""The term twin: one network is the flow map, the velocity of the data, and the velocity of its own samples.

Source: TwinFlow, Cheng et al. 2025, arXiv:2512.05150, the half that rcgm.py has not. The paper gives the network times
in [-1, 1]: at positive times it learns the data, at negative times the law of its own samples ("fake"), and the
difference of the two velocities moves the samples. Its text was not at hand: the gradient is that of matching.py, with
w the velocity of the twin, which learns by flow matching on the same samples:

    loss = descend(v, w) + fake_weight || w(xt) - (noise - sg(x0)) ||^2 / D      xt = (1 - t) sg(x0) + t noise

v is the teacher's velocity or, without a teacher as in the paper, the student's own F(x, t, t). In place of a negative
time, the network's input t - s for the interval is -1 for the twin: the input of no jump. So any network of a flow map
has a twin, which starts as the velocity of the teacher whose weights it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowmap.base.ranges import FromZero, check_ranges
from flowmap.flow.distance import Squared
from flowmap.flow.types import FlowMap, Loss, PathSample, Teacher
from flowmap.objectives.matching import WithoutFake, descend


@dataclass(frozen=True)
class Twin(WithoutFake):
    """The samples descend the difference between the twin's velocity and that of the data; the twin learns from them.

    fake_weight: of the twin's own loss. normalised: as of reverse_kl.
    """

    fake_weight: FromZero = 1.0
    normalised: bool = True
    twin: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, network: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        x, t, cond = sample.xt.detach(), sample.t, sample.cond
        with torch.no_grad():
            real = network.mean_velocity(x, t, t, cond) if teacher is None else teacher.velocity(x, t, cond)
        fake = network.mean_velocity(x, t, t + 1, cond)
        error = Squared()(fake, sample.vt.detach()).mean()
        moved = descend(sample, real, fake.detach(), normalised=self.normalised)
        return Loss(moved.value + self.fake_weight * error, {**moved.logs, "twin_loss": error.detach()})
