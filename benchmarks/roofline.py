"""What do the kernels of a full-scale step cost on an H100, before and after attention's tangent became one kernel?

From the recipe's real classes at full size on the meta device, one micro-batch: kernels, gigabytes, and the
milliseconds at the device's limits (flowmap/estimate/roofline.py), without time on the host. Before: the tangent of
attention by rows of at most 2^24 weights in memory, as in version 0.1. Ideal: each operation of the network and its
tangent are one kernel, with twice the FLOPs and bytes of the operation, and attention's further products at the
device's rate. `python benchmarks/roofline.py [--recipes sd15 sd35-medium]`
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from unittest import mock

import torch
from lib.full_scale import FullScale, full_scale
from lib.report import environment, table, write

from flowmap.estimate.roofline import Device, Step, Traffic, step_of, sustained
from flowmap.flow.tangent import attention
from flowmap.objectives import FlowMatching

COLUMNS = ["recipe", "batch", "what", "kernels", "GB", "milliseconds", "of the ideal", "student's GB", "student's ms"]
DEVICES = (Device(), sustained(200))


def by_rows(q, k, v, out, tq, tk, tv, mask, tmask, causal, scale, grouped) -> torch.Tensor:
    """The tangent of attention by blocks of queries with at most 2^24 weights: the rule of version 0.1."""
    rows = max(1, min(q.shape[-2], (1 << 24) // (math.prod(q.shape[:-2]) * k.shape[-2])))
    of_rows = lambda x, part: x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., part, :]
    assert not causal
    blocks = []
    for i in range(0, q.shape[-2], rows):
        part = slice(i, i + rows)
        masks = of_rows(mask, part), of_rows(tmask, part)
        given = of_rows(q, part), k, v, of_rows(out, part), of_rows(tq, part), tk, tv, *masks
        blocks.append(WHOLE(*given, False, scale, grouped))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


WHOLE = attention.whole


def step(scale: FullScale, before: bool) -> Step:
    """The step with attention's tangent by rows, or as one kernel."""
    if not before:
        return step_of(scale.recipe, scale.config, scale.teachers, DEVICES)
    with mock.patch.object(attention, "is_small", lambda *unused: True), mock.patch.object(attention, "whole", by_rows):
        return step_of(scale.recipe, scale.config, scale.teachers, DEVICES)


def ideal(scale: FullScale, found: Step) -> Traffic:
    """The traffic of the student's forward passes if a tangent were in the kernel of its operation.

    A kernel of a plain forward pass, at half of the device's rates, is one that also computes the tangent. The student
    of the full-scale objectives runs once with a tangent.
    """
    recipe = scale.recipe.changed(objective=FlowMatching())
    halved = tuple(replace(one, flops=one.flops / 2, bandwidth=one.bandwidth / 2) for one in DEVICES)
    plain, dual = (step_of(recipe, scale.config, (), rates).parts["student"] for rates in (DEVICES, halved))
    dual = replace(dual, flops=2 * dual.flops, bytes=2 * dual.bytes)
    student = dual + plain.times(found.student_calls - 1)
    return student + Traffic.of_flops(max(0.0, found.parts["student"].flops - student.flops), 1.0, DEVICES)


def rows_of(name: str) -> list[list]:
    """The rows of a recipe: before, after and ideal."""
    scale = FullScale.of(name)
    steps = {"before": step(scale, True), "after": step(scale, False)}
    parts = {what: one.parts for what, one in steps.items()}
    parts["ideal"] = {**parts["after"], "student": ideal(scale, steps["after"])}
    whole = {what: sum(one.values(), start=Traffic()) for what, one in parts.items()}
    return [
        [
            name, scale.rows, what, one.kernels, one.bytes / 1e9, 1e3 * one.seconds,
            one.seconds / whole["ideal"].seconds,
            parts[what]["student"].bytes / 1e9, 1e3 * parts[what]["student"].seconds,
        ]
        for what, one in whole.items()
    ]  # fmt: skip


def takes_derivative(name: str) -> bool:
    """Whether the recipe's objective has a rate along a dual forward."""
    return "derivative" in {field.name for field in fields(FullScale.of(name).recipe.objective)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", nargs="+")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.recipes or [one for one in full_scale() if takes_derivative(one)]:
        rows += rows_of(name)
        print(table(rows[-3:], COLUMNS), flush=True)
    payload = {"environment": environment(), "columns": COLUMNS, "rows": rows}
    write("roofline", {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    main()
