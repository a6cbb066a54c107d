"""Why is score distillation (DMD2) alone bad at few steps?  A ring of Gaussians, where the fake can be exact.

One cause at a time: the fake's lag (trained, or exact: the velocity of the law of fresh samples of the student), what
the fake stands for (the samples of all jumps together, or of each jump), the weight, the times at which the samples are
noised, the number of the fake's steps. Student and fake start from one network that learned the teacher's velocity.
The figure is the energy distance to fresh data at 1, 2, 4 and 8 steps, in thousandths.
`python benchmarks/score_distillation.py [--seeds 3] [--steps 600]`
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lib.report import environment, spread, table, write
from torch import Tensor

from flowmap.flow.path import Linear
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.objectives.matching import OfJump, descend
from flowmap.objectives.score_distillation import ScoreDistillation, Stopped
from flowmap.samplers import Gamma
from flowmap.teachers.exact import MixtureTeacher

RING = MixtureTeacher(
    means=tuple((math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)),
    std=(0.1,),
    weights=(1, 2, 1, 1, 3, 1, 1, 2),
)
SAMPLER, STEPS = Gamma(gamma=1.0), (1, 2, 4, 8)
BATCH, POINTS, KERNEL = 128, 1024, 0.03  # of the exact fake: how many samples, and the std of each


@dataclass(frozen=True)
class Arm:
    """fake: "trained", "exact for each jump" or "exact for all jumps together"."""

    fake: str = "trained"
    fake_steps: int = 5
    by_jump: bool = False
    steps: tuple[int, ...] = (1, 2, 4)
    normalised: bool = True
    low_times: bool = False


ARMS = {
    "exact, for each jump": Arm("exact for each jump"),
    "exact, all jumps together": Arm("exact for all jumps together"),
    "trained, all jumps together (DMD2)": Arm(),
    "trained, for each jump": Arm(by_jump=True),
    "trained, for each jump, 1 fake step": Arm(by_jump=True, fake_steps=1),
    "trained, for each jump, not normalised": Arm(by_jump=True, normalised=False),
    "trained, for each jump, t = u^2": Arm(by_jump=True, low_times=True),
    "trained, one jump alone": Arm(steps=(1,)),
}


def network(arrival: bool) -> FlowMapNet:
    return FlowMapNet(MLP(width=64, depth=3).build((2,), arrival=arrival))


def teacher_network(seed: int, steps: int = 1500) -> FlowMapNet:
    """A network that has learned the teacher's velocity."""
    torch.manual_seed(seed)
    net, generator = network(arrival=False), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        sample = noised(RING.sample(BATCH, generator), generator)
        error = net.velocity(sample.xt, sample.t) - RING.velocity(sample.xt, sample.t)
        descend_with(optimizer, error.square().sum(1).mean())
    return net


def noised(x0: Tensor, generator: torch.Generator, low_times: bool = False):
    t = torch.rand(len(x0), generator=generator)
    t = t.square() if low_times else t
    return Linear().sample(x0, torch.randn(x0.shape, generator=generator), t, t)


def descend_with(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def exact_velocity(points: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity at x (B, 2) and t (B,) of the law of points (N, 2), each a Gaussian of std KERNEL."""
    t = t[:, None]
    variance = ((1 - t) * KERNEL) ** 2 + t * t
    share = torch.softmax(-squares(x, t, points) / (2 * variance), 1)
    mean = share @ points
    return -mean + (t - KERNEL**2 * (1 - t)) / variance * (x - (1 - t) * mean)


def squares(x: Tensor, t: Tensor, points: Tensor) -> Tensor:
    """|x - (1 - t) p|^2 for every row and point, (B, N)."""
    return (x[:, None] - (1 - t)[..., None] * points).square().sum(-1)


def train(arm: Arm, start: FlowMapNet, seed: int, steps: int) -> FlowMapNet:
    """The average of a student's weights after that many steps."""
    student, fake = network(arrival=True), network(arrival=True)
    for net in (student, fake):
        start_from(net, start)
    average, objective = copy.deepcopy(student), ScoreDistillation(steps=arm.steps)
    optimizer, of_fake = torch.optim.Adam(student.parameters(), 3e-4), torch.optim.Adam(fake.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed + 100)

    def samples(count: int):
        return objective.samples(SAMPLER, student, torch.randn(count, 2, generator=generator), None, generator)

    velocity = lambda made, x, t: (OfJump(fake, made.departure) if arm.by_jump else fake).mean_velocity(x, t, t)
    for step in range(steps):
        for _ in range(arm.fake_steps if arm.fake == "trained" else 0):
            with torch.no_grad():
                made = samples(BATCH)
            sample = noised(made.x0, generator, arm.low_times)
            error = velocity(made, sample.xt, sample.t) - sample.vt
            descend_with(of_fake, error.square().sum(1).mean())
        made = samples(BATCH)
        sample = noised(made.x0, generator, arm.low_times)
        x, t = sample.xt.detach(), sample.t
        with torch.no_grad():
            if arm.fake == "trained":
                of_samples = velocity(made, x, t)
            else:
                of_samples = exact_velocity(drawn(arm, student, samples, made, generator), x, t)
        loss = descend(sample, RING.velocity(x, t), of_samples, normalised=arm.normalised)
        descend_with(optimizer, loss.value)
        for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
            mine.data.lerp_(theirs.data, max(0.01, 1 / (step + 1)))
    return average


def drawn(arm: Arm, student: FlowMapNet, samples: Callable, made, generator: torch.Generator) -> Tensor:
    """Fresh samples of the student: of all jumps, or of the jump that made `made`."""
    if arm.fake == "exact for all jumps together":
        return torch.cat([samples(POINTS // 16).x0 for _ in range(16)])
    steps = next(k for k in arm.steps if made.departure in SAMPLER.times(k) and made.jumps <= k)
    stopped = Stopped(student, made.jumps)
    SAMPLER(stopped, torch.randn(POINTS, 2, generator=generator), None, steps=steps, generator=generator)
    return stopped.arrival


@torch.no_grad()
def distances(student: FlowMapNet, count: int = 4000) -> list[float]:
    """The energy distance to fresh data at each of STEPS, in thousandths."""
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    data = RING.sample(count, seeded(999))
    apart = lambda a, b: float(torch.cdist(a, b).mean())
    found = []
    for steps in STEPS:
        x = SAMPLER(student, torch.randn(count, 2, generator=seeded(5)), None, steps=steps, generator=seeded(6))
        found.append(1000 * (2 * apart(x, data) - apart(x, x) - apart(data, data)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    a = parser.parse_args()
    starts = [teacher_network(seed) for seed in range(a.seeds)]
    rows = []
    for name in a.arms:
        found = [distances(train(ARMS[name], start, seed, a.steps)) for seed, start in enumerate(starts)]
        rows.append([name, *(spread(one[i] for one in found) for i in range(len(STEPS)))])
        print(rows[-1], flush=True)
    columns = ["fake", *(f"{k} step{'s' * (k > 1)}" for k in STEPS)]
    print(table(rows, columns))
    settings = {"seeds": list(range(a.seeds)), "steps": a.steps, "batch": BATCH}
    question = {"question": __doc__.splitlines()[0], "environment": environment(), "settings": settings}
    write("score_distillation", {**question, "tables": {"causes": {"columns": columns, "rows": rows}}})


if __name__ == "__main__":
    main()
