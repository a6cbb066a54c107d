"""What does the tangent of attention cost in memory and time, in math attention's forward-mode derivative?

One call gives output and tangent, of float32 with all of q, k and v moving. Ways are timed in turn, round after round,
in CPU time of one thread, and compared as ratios within a round. Peak memory is the largest sum of bytes alive besides
the arguments, over torch's allocations.
`python benchmarks/attention.py [--tokens 64 256 512 1024 2048 4096] [--heads 4] [--size 64] [--rounds 7]`
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lib.report import environment, table, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap.estimate.live import LiveBytes
from flowmap.flow.tangent import attention
from flowmap.flow.tangent.attention_blocks import product

BLOCKS, BEFORE = "blocks (now, large)", "whole, by rows of 64 MiB (before)"
MATH, WHOLE = "math attention, torch.func.jvp", "whole (now, small)"
COLUMNS = ["tokens", "way", "times math attention", "CPU milliseconds", "peak MiB", "peak, of the arguments"]


def by_blocks(q, k, v, out, tq, tk, tv) -> Tensor:
    return attention.by_operator(q, k, v, out, tq, tk, tv, None, None, False, q.shape[-1] ** -0.5, False)


def as_a_whole(q, k, v, out, tq, tk, tv) -> Tensor:
    return attention.whole(q, k, v, out, tq, tk, tv, None, None, False, q.shape[-1] ** -0.5, False)


def by_rows(q, k, v, out, tq, tk, tv) -> Tensor:
    """The rule of version 0.1: blocks of queries with at most 2^24 weights."""
    scale, blocks = q.shape[-1] ** -0.5, []
    rows = max(1, min(q.shape[-2], (1 << 24) // (math.prod(q.shape[:-2]) * k.shape[-2])))
    for i in range(0, q.shape[-2], rows):
        part = slice(i, i + rows)
        weights = torch.softmax(product(q[..., part, :], k.mT, scale), -1)
        moved = product(tq[..., part, :], k.mT, scale) + product(q[..., part, :], tk.mT, scale)
        moved = moved * weights
        d = torch.addcmul(product(moved, v), moved.sum(-1, keepdim=True), out[..., part, :], value=-1)
        blocks.append(d + product(weights, tv))
    return torch.cat(blocks, -2)


def math_attention(arrays: list[Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, tuple(arrays[:3]), tuple(arrays[3:]))[1]


def ways(arrays: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Output and tangent in each way; all but math attention take the output from torch's fused kernel."""

    def fused(tangent: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: tangent(*arrays[:3], F.scaled_dot_product_attention(*arrays[:3]), *arrays[3:])

    found = {MATH: lambda: math_attention(arrays), BEFORE: fused(by_rows), BLOCKS: fused(by_blocks)}
    return found | {WHOLE: fused(as_a_whole)}


def measured(tokens: int, arguments: argparse.Namespace) -> list[list]:
    """The rows of a number of tokens."""
    shape = (6, arguments.batch, arguments.heads, tokens, arguments.size)
    arrays = list(torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind())
    size = sum(x.numel() * x.element_size() for x in arrays)
    calls, seconds, peaks = ways(arrays), {}, {}
    with torch.no_grad():
        reference = math_attention([x[:, :1].double() for x in arrays])
        for name, call in calls.items():
            with LiveBytes() as live:
                found = call()
            peaks[name], seconds[name] = live.peak, []
            assert float((found[:, :1] - reference).abs().max() / reference.abs().max()) < 1e-5, name
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                started = time.process_time()
                call()
                seconds[name].append(time.process_time() - started)
    ratio = lambda name: statistics.median(a / b for a, b in zip(seconds[name], seconds[MATH], strict=True))
    return [
        [tokens, name, ratio(name), 1e3 * statistics.median(seconds[name]), peaks[name] / 2**20, peaks[name] / size]
        for name in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for tokens in arguments.tokens:
        rows += measured(tokens, arguments)
        print(table(rows[-4:], COLUMNS), flush=True)
    setting = {key: value for key, value in vars(arguments).items() if key != "tokens"}
    payload = {"environment": environment(), "setting": setting, "columns": COLUMNS, "rows": rows}
    write("attention", {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    main()
