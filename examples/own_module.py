"""A teacher and a student of your own, plain `nn.Module`s in a plain training loop, with AYF's mixed objective.

    python examples/own_module.py [STEPS]

The data are eight blobs on a circle.  The clock is t = 0 for data and t = 1 for noise.  The network gives the mean
velocity F(x, t, s) from time t to time s; with s = t that is a velocity, so one class serves as teacher and student.
"""

import sys

import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.flow.times import Mixture
from flowmap.objectives.ayf import AYFMixed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def mean_velocity(self, x, t, s, cond=None):
        return self.layers(torch.cat([x, t[:, None], (t - s)[:, None]], dim=1))

    def velocity(self, x, t, cond=None):
        return self.mean_velocity(x, t, t)

    def forward(self, x, t, s, cond=None):
        return x + (s - t)[:, None] * self.mean_velocity(x, t, s)


def train(net, loss, steps, times):
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        angle = torch.randint(8, (256,)) * torch.pi / 4
        x0 = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * torch.randn(256, 2)
        sample = Linear().sample(x0, torch.randn(256, 2), *times(256))
        optimizer.zero_grad()
        loss(sample, step).backward()
        optimizer.step()


torch.manual_seed(0)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
teacher, student, times = Net(), Net(), Mixture(one_step=0.15, diagonal=0.2)
train(teacher, lambda sample, step: (teacher.velocity(sample.xt, sample.t) - sample.vt).square().mean(), steps, times)
student.load_state_dict(teacher.requires_grad_(False).state_dict())
objective = AYFMixed(warmup_steps=steps // 4)
train(student, lambda sample, step: objective(student, teacher, sample, step).value, steps, times)

noise, one = torch.randn(1000, 2), torch.ones(1000)
with torch.no_grad():
    x_student, x_teacher = student(student(noise, one, 0.5 * one), 0.5 * one, 0 * one), noise
    for i in range(64, 0, -1):
        x_teacher = x_teacher - teacher.velocity(x_teacher, one * i / 64) / 64
distance = float((x_student - x_teacher).square().sum(dim=1).mean().sqrt())
print(f"student at 2 steps and teacher at 64, from the same noise: {distance:.3f} apart (RMS)")
