"""Does a student trained with ayf_emd or ayf_lmd reach the exact flow map?  RMSE at 1, 2 and 4 steps from the same noise.

Teacher: a ring of 8 Gaussians (std 0.1 on the unit circle), exact velocity; truth: its flow map by a fine float64 integration.  The same MLP,
budget and draws for both objectives; beside them, a network trained with the same budget to the velocity alone (flow matching on the exact
velocity) and the exact velocity itself, both by Euler.  RMSE is over points and coordinates, given also over the data's std.
`python benchmarks/exactness.py [--seeds 3] [--steps 3000]`
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from _report import environment, table, write

from flowmap.flow.path import Linear
from flowmap.flow.times import Interval, Mixture
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD, AYFLMD, FlowMatching
from flowmap.teachers.exact import MixtureTeacher

CALLS = (1, 2, 4)
TEACHER = MixtureTeacher(means=tuple((math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)), std=(0.1,))
TIMES = Mixture(base=Interval(mean=-0.8, std=1.0), one_step=0.05, diagonal=0.25)
BATCH, RATE, POINTS = 512, 3e-3, 4096


def objectives(steps: int) -> dict:
    warm_up = steps // 10
    return {"ayf_emd": AYFEMD(warmup_steps=warm_up), "ayf_lmd": AYFLMD(warmup_steps=warm_up), "flow_matching": FlowMatching()}


def train(objective, seed: int, steps: int) -> FlowMapNet:
    """The exponential average (rate 1 / 100) of a student's weights after so many steps of Adam, its rate falling by a cosine to zero."""
    torch.manual_seed(seed)
    student = FlowMapNet(MLP(width=128, depth=3).build((2,)))
    average = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer, generator = torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.99)), torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0, x1 = TEACHER.sample(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        sample = Linear().sample(x0, x1, *TIMES(BATCH, generator=generator))
        optimizer.zero_grad()
        objective(student, TEACHER, sample, step).value.backward()
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
def by_euler(velocity, x1: torch.Tensor, calls: int) -> torch.Tensor:
    x = x1.float()
    for i in range(calls, 0, -1):
        x = x - velocity(x, torch.full((len(x),), i / calls)) / calls
    return x.double()


def rmse(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    x1 = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(12345), dtype=torch.float64)
    ones = torch.ones(POINTS, dtype=torch.float64)
    truth = TEACHER.flow_map(x1, ones, 0 * ones)
    data_std = float(TEACHER.sample(200_000, torch.Generator().manual_seed(1)).std())
    found, seconds = {}, {}
    for name, objective in objectives(arguments.steps).items():
        start, sample = time.process_time(), by_euler if name == "flow_matching" else by_map
        students = [train(objective, seed, arguments.steps) for seed in range(arguments.seeds)]
        seconds[name] = (time.process_time() - start) / arguments.seeds
        for calls in CALLS:
            found[name, calls] = [rmse(sample(s.velocity if name == "flow_matching" else s, x1, calls), truth) for s in students]
    for calls in (*CALLS, 64):
        found["exact velocity, Euler", calls] = [rmse(by_euler(TEACHER.velocity, x1, calls), truth)]
    rows = [[*key, statistics.median(v), min(v), max(v), statistics.median(v) / data_std] for key, v in found.items()]
    columns = ["trained with", "steps", "RMSE, median", "least", "most", "median / data std"]
    print(table(rows, columns))
    print(f"data std {data_std:.4f}; {arguments.seeds} seeds; CPU seconds a training: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    settings = {"seeds": list(range(arguments.seeds)), "steps": arguments.steps, "batch": BATCH, "lr": RATE, "points": POINTS, "data_std": data_std}
    measured = [{"trained_with": name, "steps": calls, "rmse": values} for (name, calls), values in found.items()]
    payload = {"question": __doc__.splitlines()[0], "environment": environment(), "settings": settings}
    write("exactness", {**payload, "cpu_seconds_a_training": seconds, "columns": columns, "rows": rows, "measured": measured})


if __name__ == "__main__":
    main()
