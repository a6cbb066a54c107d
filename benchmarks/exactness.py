"""Does a student trained with ayf_emd, ayf_lmd or ayf_mixed reach the exact flow map?  RMSE at 1, 2 and 4 steps.

RMSE is between points from the same noise, over points and coordinates, and given also over the data's std. Teachers: a
ring of 8 Gaussians on the unit circle, sharp (std 0.1) and soft (std 0.3), with exact velocity.
Truth: the flow map by a fine float64 integration.  All objectives have the same MLP, budget and draws, and r_max = 1
(below it the fixed point is not the exact map).  The table also has the exact velocity by Euler.
`python benchmarks/exactness.py [--seeds 5] [--steps 4800]`
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial

import torch
from lib.report import environment, table, write
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowmap.flow.path import Linear
from flowmap.flow.times import Mixture, Uniform
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD, AYFLMD, AYFMixed
from flowmap.teachers.exact import MixtureTeacher

CALLS = (1, 2, 4)
MEANS = tuple((math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8))
TEACHERS = {"sharp ring": MixtureTeacher(MEANS, std=(0.1,)), "soft ring": MixtureTeacher(MEANS, std=(0.3,))}
OBJECTIVES = {
    "ayf_emd": AYFEMD,
    "ayf_lmd": AYFLMD,
    "ayf_mixed": partial(AYFMixed, lagrangian=0.25, own_lagrangian=1.0),
}  # as in recipes/digits.yaml
SETTINGS = {"r_max": 1.0, "norm": "l2", "c": 1.0}
TIMES = Mixture(base=Uniform(pairs="sorted"), one_step=0.05, diagonal=0.25, diagonal_at="arrival")
NET = MLP(width=128, depth=3, cycles=0.5)
BATCH, RATE, POINTS = 256, 3e-3, 4096


def train(objective, teacher, seed: int, steps: int) -> FlowMapNet:
    """The exponential average (rate 1 / 100) of a student's weights after `steps` steps of Adam, with cosine decay."""
    torch.manual_seed(seed)
    student = FlowMapNet(NET.build((2,)))
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer, generator = (
        torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.99)),
        torch.Generator().manual_seed(seed),
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0, x1 = teacher.sample(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        sample = Linear().sample(x0, x1, *TIMES(BATCH, generator=generator))
        optimizer.zero_grad()
        objective(student, teacher, sample, step).value.backward()
        optimizer.step()
        average.update_parameters(student)
    return average.module.eval()


@torch.no_grad()
def by_map(student, x1: torch.Tensor, calls: int) -> torch.Tensor:
    """The student's jumps over an even grid, in float32."""
    x = x1.float()
    for i in range(calls, 0, -1):
        x = student(x, torch.full((len(x),), i / calls), torch.full((len(x),), (i - 1) / calls))
    return x.double()


@torch.no_grad()
def by_euler(teacher, x1: torch.Tensor, calls: int) -> torch.Tensor:
    """The exact velocity over an even grid."""
    x = x1
    for i in range(calls, 0, -1):
        x = x - teacher.velocity(x, torch.full((len(x),), i / calls, dtype=x.dtype)) / calls
    return x


def rmse(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).square().mean().sqrt())


def on(teacher, x1: torch.Tensor, seeds: int, steps: int) -> tuple[dict, float]:
    """RMSE of each objective's students, and of Euler, by number of calls; the CPU seconds of one training."""
    ones = torch.ones(len(x1), dtype=torch.float64)
    truth, found, start = teacher.flow_map(x1, ones, 0 * ones), {}, time.process_time()
    for name, kind in OBJECTIVES.items():
        students = [train(kind(warmup_steps=steps // 2, **SETTINGS), teacher, seed, steps) for seed in range(seeds)]
        found.update(
            {(name, calls): [rmse(by_map(student, x1, calls), truth) for student in students] for calls in CALLS}
        )
    seconds = (time.process_time() - start) / (len(OBJECTIVES) * seeds)
    found.update({("exact velocity, Euler", calls): [rmse(by_euler(teacher, x1, calls), truth)] for calls in CALLS})
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4800)
    arguments = parser.parse_args()
    x1 = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(12345), dtype=torch.float64)
    rows, measured, seconds = [], [], {}
    for data, teacher in TEACHERS.items():
        std = float(teacher.sample(200_000, torch.Generator().manual_seed(1)).std())
        found, seconds[data] = on(teacher, x1, arguments.seeds, arguments.steps)
        rows += [
            [data, *key, statistics.median(v), min(v), max(v), statistics.median(v) / std] for key, v in found.items()
        ]
        measured += [
            {"data": data, "data_std": std, "trained_with": key[0], "steps": key[1], "rmse": v}
            for key, v in found.items()
        ]
    columns = ["data", "trained with", "steps", "RMSE, median", "least", "most", "median / data std"]
    print(table(rows, columns))
    each = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"{arguments.seeds} seeds, {arguments.steps} training steps of {BATCH}; CPU seconds a training: {each}")
    settings = {
        "seeds": list(range(arguments.seeds)),
        "steps": arguments.steps,
        "batch": BATCH,
        "lr": RATE,
        "points": POINTS,
        **SETTINGS,
    }
    payload = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "settings": {**settings, "net": str(NET), "times": str(TIMES)},
    }
    write(
        "exactness",
        {**payload, "cpu_seconds_a_training": seconds, "columns": columns, "rows": rows, "measured": measured},
    )


if __name__ == "__main__":
    main()
