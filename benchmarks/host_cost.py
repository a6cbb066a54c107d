"""What does the dual forward cost the host?  Full-scale networks at full depth and tiny width, one thread.

Kernels on tiny tensors cost next to nothing, so the time of a call is the host's: Python, dispatch, graph.  Plain and
dual forward are timed in turn, round after round; "kernels" are the operations that reach torch's dispatcher, views
apart.  With --before, another checkout of flowmap is timed in the same rounds by a second process.
`python benchmarks/host_cost.py [--networks edm2-s dit-xl ...] [--rounds 30] [--before CHECKOUT] [--backward]`
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NETWORKS = ("edm2-s", "dit-xl", "sd15", "sd35-medium", "sana")
RECIPES = {"dit-xl": "dit256"}  # the recipe of the network, where it has another name
TINY = {  # settings of diffusers networks at tiny width; their depth is the recipe's
    "dit-xl": {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4},
    "sd15": {
        "block_out_channels": [8, 16, 16, 16], "cross_attention_dim": 8, "attention_head_dim": 2,
        "norm_num_groups": 4, "sample_size": 8,
    },
    "sd35-medium": {
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
        "pooled_projection_dim": 16, "sample_size": 8, "pos_embed_max_size": 8,
    },
    "sana": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 4,
    },
}  # fmt: skip
BATCH, TOKENS = 2, 4
VIEWS = set(
    "view _unsafe_view permute transpose t expand select slice unsqueeze squeeze split chunk unbind detach alias "
    "as_strided split_with_sizes narrow lift_fresh diagonal _reshape_alias empty empty_like new_empty".split()
)
COLUMNS = [
    "network",
    "checkout",
    "kernels, plain",
    "kernels, dual",
    "ms, plain",
    "ms, dual",
    "dual / plain",
    "us a kernel, plain",
    "us an extra kernel, dual",
]


class Counter(TorchDispatchMode):
    """Counts the kernels that are dispatched, views apart."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def edm2_s():
    """EDM2-S with 8 channels, its attention at the two coarsest levels."""
    from flowmap.nets.edm2 import EDM2, Block
    from flowmap.nets.flow_map import FlowMapNet

    net = EDM2("S", channels=8, attention_at=(2, 1)).build((4, 8, 8), num_classes=10, arrival=True, guidance=True)
    for block in net.modules():
        if isinstance(block, Block) and block.attn_qkv is not None:
            block.heads = 1  # one for every 64 channels otherwise
    for gain in (p for p in net.parameters() if p.ndim == 0):
        gain.data.fill_(0.5)
    cond = {"class": torch.zeros(BATCH, dtype=torch.int64), "guidance": torch.full((BATCH,), 2.0)}
    return FlowMapNet(net), (4, 8, 8), cond


def of_diffusers(name: str):
    """The student of a recipe at tiny width."""
    from lib.full_scale import FullScale

    from flowmap.student.examples import conditions_of

    config = FullScale.of(RECIPES.get(name, name)).config
    settings = json.loads(config.net.settings) | TINY[name]
    shape = (config.shape[0], settings["sample_size"], settings["sample_size"])
    config = replace(config, net=replace(config.net, settings=json.dumps(settings)), shape=shape)
    width = {"sd15": 8, "sd35-medium": 16, "sana": 16}.get(name, 0)
    cond = conditions_of(config, BATCH) | ({"text": torch.randn(BATCH, TOKENS, width)} if width else {})
    if name == "sd35-medium":
        cond["pooled"] = torch.randn(BATCH, 16)
    if "text_mask" in cond:
        cond["text_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return config.build(), shape, cond


def calls_of(name: str) -> dict[str, Callable[[], object]]:
    """The plain forward and the dual forward of one network, each alone and with the backward pass."""
    from flowmap.flow.derivative import eulerian_derivative

    torch.manual_seed(0)
    student, shape, cond = edm2_s() if name == "edm2-s" else of_diffusers(name)
    student.train().requires_grad_(True)
    x, v, t, s = torch.randn(BATCH, *shape), torch.randn(BATCH, *shape), torch.tensor([0.7, 0.6]), torch.full((2,), 0.1)

    def plain():
        return student.mean_velocity(x, t, s, cond)

    def dual():
        return eulerian_derivative(student, x, t, s, v, cond, mode="dual")[0]

    def trained(forward):
        forward().sum().backward()
        student.zero_grad(set_to_none=True)

    calls = {"plain": plain, "dual": dual}
    return calls | {f"{key}, backward": functools.partial(trained, call) for key, call in calls.items()}


def work() -> None:
    """Answer the parent's requests, one a line: the name of a network to build, or of a call to time."""
    torch.set_num_threads(1)
    calls: dict[str, Callable[[], object]] = {}
    for request in map(str.strip, sys.stdin):
        if request in NETWORKS:
            calls, answer = calls_of(request), {}
            for key, call in calls.items():
                with Counter() as counter:
                    call()
                answer[key] = counter.count
        else:
            started = time.process_time()
            calls[request]()
            answer = time.process_time() - started
        print("answer", json.dumps(answer), flush=True)


class Worker:
    """A process with flowmap from one checkout."""

    def __init__(self, checkout: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: str):
        assert self.process.stdin is not None and self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer"):
                return json.loads(line.partition(" ")[2])
        raise RuntimeError(f"{request}: the worker has ended")


def measured(name: str, workers: dict[str, Worker], rounds: int, backward: bool) -> list[list]:
    """The rows of one network: medians over rounds in which every call of every checkout has its turn."""
    kernels = {key: worker.ask(name) for key, worker in workers.items()}
    keys = [key for key in next(iter(kernels.values())) if backward or "backward" not in key]
    seconds: dict[tuple[str, str], list[float]] = {(key, call): [] for key in workers for call in keys}
    for i in range(rounds + 3):
        for key, worker in workers.items():
            for call in keys:
                found = worker.ask(call)
                if i >= 3:  # the first rounds warm up
                    seconds[key, call].append(found)
    rows = []
    for key in workers:
        for suffix in ("", ", backward") if backward else ("",):
            plain, dual = (seconds[key, call + suffix] for call in ("plain", "dual"))
            k, d = (kernels[key][call + suffix] for call in ("plain", "dual"))
            ratio = statistics.median(b / a for a, b in zip(plain, dual, strict=True))
            extra = statistics.median(b - a for a, b in zip(plain, dual, strict=True))
            a, b = statistics.median(plain), statistics.median(dual)
            rows.append([name + suffix, key, k, d, 1e3 * a, 1e3 * b, ratio, 1e6 * a / k, 1e6 * extra / (d - k)])
    return rows


def main() -> None:
    from lib.report import environment, table, write

    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--before", help="a checkout to compare with")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--name", default="host_cost", help="the file of the result; an empty name writes none")
    arguments = parser.parse_args()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    workers = {} if arguments.before is None else {"before": Worker(arguments.before)}
    workers["this one"] = Worker(here)
    rows = []
    for name in arguments.networks:
        rows += measured(name, workers, arguments.rounds, arguments.backward)
        print(table(rows[-2 * len(workers) if arguments.backward else -len(workers) :], COLUMNS), flush=True)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()
    if arguments.name:
        setting = {"rounds": arguments.rounds, "batch": BATCH}
        payload = {"environment": environment(), "setting": setting, "columns": COLUMNS, "rows": rows}
        write(arguments.name, {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
