"""Is the compiled exact step right, and what does it cost, for every network family, small and wide?

Networks are those of tests/support/every_net.py. Costs are CPU time of one thread: steps with forward and backward,
timed in turn, round after round, and divided within a round. The difference is the largest relative one of value,
rate and gradients between the compiled and the eager dual forward, in float32. Under bf16 autocast each has an error
against float64; "error, compiled / eager" is the largest quotient of the two. FLOPs (of products) and bytes (as
inductor counts them in its graphs) are quotients of the exact and the plain step too: the cost if they alone took time.
Every row is kept at once, and a later run goes on with those that are missing.
`python benchmarks/step_cost_families.py [--sizes small wide] [--only dit ...] [--dtypes float32 bf16] [--rounds 12]
[--again]`
"""

from __future__ import annotations

import argparse
import copy
import logging
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lib.report import RESULTS, environment, kept, table, write
from step_cost import COMPILED, one_step, ratios, ways
from torch import Tensor
from torch._inductor import compile_fx, config, metrics
from torch._inductor.utils import fresh_cache

from flowmap.estimate.flops import Flops
from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.path import Linear
from flowmap.flow.tangent.compiled import Compiled
from flowmap.flow.times import Interval, Uniform
from flowmap.nets.flow_map import FlowMapNet
from tests.support.every_net import SIZES, Sized

NAME = "step_cost_families"
COSTS = ["exact", "plain, compiled", "exact, compiled", "exact / plain, both compiled"]
BFLOAT16 = ["bf16 error", "error, compiled / eager"]
COLUMNS = [
    "network", "size", "million parameters", *COSTS, "FLOPs", "bytes", "ms, plain step", "graphs", "fallbacks",
    "CPU s, compile", "difference", *BFLOAT16, "CPU s, compile, bf16", "commit",
]  # fmt: skip


def twin(student: FlowMapNet) -> FlowMapNet:
    """The same flow map with a compiled network; the parameters are shared."""
    net = copy.copy(student.net)
    net.__dict__["forward"] = Compiled(student.net.forward, log=partial(print, flush=True))
    return FlowMapNet(net).train()


def results(student: FlowMapNet, draw: dict[str, Any]) -> list[Tensor]:
    """Value, rate and the gradients of a loss with both, as one vector."""
    student.zero_grad(set_to_none=True)
    value, rate = eulerian_derivative(student, **draw)
    ((value - rate) ** 2).mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    student.zero_grad(set_to_none=True)
    return [value.detach(), rate, gradients]


def apart(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The relative difference of each result, in float64."""
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True)]


def spent() -> float:
    """The CPU seconds of this process and of the compilers that it started."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (0, resource.RUSAGE_CHILDREN)))


def in_float32(sized: Sized, rounds: int) -> dict[str, Any]:
    """The costs of steps, and the difference between compiled and eager."""
    student, draw = sized.student(), sized.draw(sized.batch)
    fused, wanted = twin(student), results(student, draw)
    losses = {name: loss for name, (loss, _) in ways().items()}
    plain, exact = list(COMPILED)[:2]
    steps = {
        name: partial(one_step, net, losses[way], sample_of(sized, times, draw["cond"]))
        for name, net, way, times in (
            ("plain", student, plain, Uniform()), ("plain, compiled", fused, plain, Uniform()),
            ("exact", student, exact, Interval()), ("exact, compiled", fused, exact, Interval()),
        )
    }  # fmt: skip
    flops = {name: flops_of(steps[name]) for name in ("plain", "exact")}
    started, size = spent(), metrics.num_bytes_accessed
    difference, exact_size = max(apart(results(fused, draw), wanted)), metrics.num_bytes_accessed - size
    steps["plain, compiled"]()
    compiling, plain_size = spent() - started, metrics.num_bytes_accessed - size - exact_size
    seconds = timed(steps, rounds)
    both = (fused.net.forward.plain, fused.net.forward.dual)
    for way in both:
        if way.stopped is not None:
            print(f"{way.name}: {way.stopped}", flush=True)
    unit, of_compiled = seconds["plain"], seconds["plain, compiled"]
    return {
        "million parameters": sum(p.numel() for p in student.parameters()) / 1e6,
        **{name: ratios(seconds[name], unit)[0] for name in COSTS[:3]},
        COSTS[3]: ratios(seconds["exact, compiled"], of_compiled)[0],
        "FLOPs": flops["exact"] / flops["plain"],
        "bytes": exact_size / plain_size,
        "ms, plain step": 1e3 * statistics.median(unit),
        "graphs": sum(way.graphs for way in both),
        "fallbacks": sum(way.fallbacks for way in both),
        "CPU s, compile": compiling,
        "difference": difference,
    }


def flops_of(step: Callable[[], None]) -> int:
    """The FLOPs of the products of a step."""
    with Flops() as counted:
        step()
    return counted.count


def sample_of(sized: Sized, times, cond: dict[str, Tensor]):
    """A sample of the linear path at drawn times."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(sized.batch, *sized.shape, generator=generator) for _ in range(2))
    return Linear().sample(x0, x1, *times(sized.batch, device=x0.device, generator=generator), cond)


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """name -> the CPU seconds of a step in every round, after two rounds that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if i >= 2:
                seconds[name].append(time.process_time() - started)
    return seconds


def in_bf16(sized: Sized, rounds: int) -> dict[str, Any]:
    """The errors of value, rate and gradients under bf16 autocast, eager and compiled, against float64."""
    student, draw = sized.student(), sized.draw(sized.batch)
    exact = results(copy.deepcopy(student).double(), sized.draw(sized.batch, dtype=torch.float64))
    fused = twin(student)
    with torch.autocast("cpu", torch.bfloat16):
        eager = apart(results(student, draw), exact)
        started = spent()
        compiled = apart(results(fused, draw), exact)
    assert fused.net.forward.dual.fallbacks == 0, fused.net.forward.dual.stopped
    return {
        "bf16 error": max(eager),
        "error, compiled / eager": max(a / b for a, b in zip(compiled, eager, strict=True)),
        "CPU s, compile, bf16": spent() - started,
    }


MEASURES = {"float32": (in_float32, "difference"), "bf16": (in_bf16, "bf16 error")}
"""By dtype: what measures, and a column that it fills."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--only", nargs="*", help="these networks")
    parser.add_argument("--dtypes", nargs="*", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--again", action="store_true", help="also those that were measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # at that level inductor counts bytes
    compile_fx.inductor_metrics_log.propagate = False
    config.compile_threads = 1  # compilers are then children of this process, whose time counts
    for size in arguments.sizes:
        for name in arguments.only or SIZES[size]:
            for dtype in arguments.dtypes:
                measure, column = MEASURES[dtype]
                row = rows().get((name, size), {"network": name, "size": size})
                if row.get(column, "") == "" or arguments.again:
                    print(f"{name}, {size}, {dtype}", flush=True)
                    with fresh_cache():
                        row |= measure(SIZES[size][name], arguments.rounds)
                    row["commit"] = environment()["commit"][:10]
                    torch.compiler.reset()
                    finish([*(rows() | {(name, size): row}).values()], arguments.rounds)
    print(table([[row.get(column, "") for column in COLUMNS] for row in rows().values()], COLUMNS))


def rows() -> dict[tuple, dict]:
    """(network, size) -> its row, as kept; runs at the same time may each add to them."""
    before = kept(RESULTS / f"{NAME}.json")
    return {tuple(row[:2]): dict(zip(before["columns"], row, strict=True)) for row in before.get("rows", [])}


def finish(found: list[dict], rounds: int) -> None:
    """Keep the rows, in the order of the networks."""
    order = {(name, size): i for size, every in SIZES.items() for i, name in enumerate(every)}
    found = sorted(found, key=lambda row: (list(SIZES).index(row["size"]), order[row["network"], row["size"]]))
    values = [[row.get(column, "") for column in COLUMNS] for row in found if len(row) > 2]
    setting = {"threads": 1, "rounds": rounds, "clock": "CPU time"}
    payload = {"environment": environment(), "setting": setting, "columns": COLUMNS, "rows": values}
    write(NAME, {"question": (__doc__ or "").splitlines()[0], **payload})


if __name__ == "__main__":
    main()
