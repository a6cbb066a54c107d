"""A student and a teacher of straight paths for tests of the page: every number of steps gives the same samples."""

from __future__ import annotations

import torch
from torch import nn

from flowmap.build.teacher import BuiltTeacher
from flowmap.evaluation.columns import LoadedTeacher
from flowmap.evaluation.demo import Demo
from flowmap.nets import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.student import Student
from tests.support.straight import MEAN, STD, StraightStudent

SHAPE = (3, 4, 6)
NAMES = ("circle", "square", "triangle")


class Straight(StraightStudent, nn.Module):
    """The network of both: the straight lines, and the conditions of each call."""

    network_calls = 1

    def __init__(self):
        super().__init__()
        self.unused, self.seen = nn.Parameter(torch.zeros(1)), []

    def mean_velocity(self, x, t, s, cond=None):
        self.seen.append(cond)
        return super().mean_velocity(x, t, s, cond)

    def velocity(self, x, t, cond=None):
        return self.mean_velocity(x, t, t, cond)

    __call__ = StraightStudent.__call__


def straight_student(**more) -> Student:
    net = MLP(width=8, depth=1)
    config = StudentConfig(net, Deterministic(), SHAPE, samples=Pixels(clamp=False), recipe="straight", **more)
    return Student(config, Straight())


def straight_demo(**more) -> Demo:
    return Demo(straight_student(**more), LoadedTeacher(BuiltTeacher(Straight(), None), 8))


def ends(num: int, seed: int) -> torch.Tensor:
    """Where the straight lines from the noise of that seed end."""
    x1 = straight_student().start(num, torch.Generator().manual_seed(seed)).x1
    return MEAN + STD * x1
