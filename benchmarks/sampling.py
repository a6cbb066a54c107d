"""What does sampling cost beside the network's own forward passes?  Latency and throughput by batch size, one run.

`student.sample(n, steps=k)` draws noise, reads conditions, runs the sampler and clamps; it is compared with k bare
forward passes of its network on the same rows, in turn, round after round, as ratios within a round.  With --compile
the compiled sampler is timed in the same rounds; its compile time is reported apart.
`python benchmarks/sampling.py [--networks digits dit] [--batches 1 4 16 64] [--steps 1 4] [--rounds 20] [--compile]`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lib.report import environment, table, write

from flowmap.base.precision import wait_for
from flowmap.nets import DiT
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.student import Student

NETWORKS = {  # the shipped digits recipes' network, and that of benchmarks/step_cost.py
    "digits": (DiT(preset="nano"), (1, 8, 8)),
    "dit": (DiT(preset="mini"), (4, 16, 16)),
}
COLUMNS = [
    "network",
    "parameters",
    "batch",
    "steps",
    "ms, bare forward passes",
    "ms, sample",
    "sample / bare",
    "samples a second",
    "ms, compiled",
    "compiled / sample",
    "s, compile",
]


def built(name: str, device: torch.device) -> Student:
    """A class-conditional student of that network with random weights."""
    net, shape = NETWORKS[name]
    config = StudentConfig(net, Deterministic(), shape, num_classes=10, samples=Pixels())
    torch.manual_seed(0)
    flow_map = config.build().eval().requires_grad_(False).to(device)
    for parameter in flow_map.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return Student(config, flow_map)


def bare(student: Student, batch: int, steps: int) -> Callable[[], object]:
    """The network called `steps` times on one batch, and nothing else."""
    x = torch.randn(batch, *student.config.shape, device=student.device)
    t, s = torch.full((batch,), 0.7, device=student.device), torch.full((batch,), 0.3, device=student.device)
    cond = {"class": torch.arange(batch, device=student.device) % 10}

    @torch.no_grad()
    def call() -> None:
        for _ in range(steps):
            student.flow_map.net(x, t, s, cond)

    return call


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The time of a call: on a CPU that of its threads, which other processes do not lengthen."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait_for(device)
    started = clock()
    call()
    wait_for(device)
    return clock() - started


def row(name: str, student: Student, batch: int, steps: int, rounds: int, compiles: bool) -> list:
    """One line of the table: medians, and the median of the ratios within a round."""
    calls = {"bare": bare(student, batch, steps), "sample": lambda: student.sample(batch, steps=steps)}
    started = time.perf_counter()
    if compiles:
        calls["compiled"] = lambda: student.sample(batch, steps=steps, compile=True)
        calls["compiled"]()
    compile_seconds = time.perf_counter() - started
    found: dict[str, list[float]] = {key: [] for key in calls}
    for i in range(rounds + 2):
        for key, call in calls.items():
            taken = seconds_of(call, student.device)
            if i >= 2:  # the first rounds warm up
                found[key].append(taken)
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))
    middle = {key: statistics.median(values) for key, values in found.items()}
    parameters = sum(p.numel() for p in student.parameters())
    start = [name, parameters, batch, steps, 1e3 * middle["bare"], 1e3 * middle["sample"], ratio("sample", "bare")]
    tail = [1e3 * middle["compiled"], ratio("compiled", "sample"), compile_seconds] if compiles else ["", "", ""]
    return [*start, batch / middle["sample"], *tail]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", default="sampling", help="the file of the result; an empty name writes none")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.networks:
        student = built(name, torch.device(arguments.device))
        for batch in arguments.batches:
            for steps in arguments.steps:
                rows.append(row(name, student, batch, steps, arguments.rounds, arguments.compile))
                print(rows[-1], flush=True)
    print(table(rows, COLUMNS))
    if arguments.name:
        setting = {"rounds": arguments.rounds, "threads": arguments.threads, "device": arguments.device}
        payload = {"environment": environment(), "setting": setting, "columns": COLUMNS, "rows": rows}
        write(arguments.name, {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    main()
