"""Would every full-scale recipe come through on a node of 8 GPUs, and on 4 nodes?  Counted on a machine without a GPU.

For each recipe, from its real classes at full size on torch's meta device: whether student, teacher and one training
step can be made, whether the weights split over fake process groups of 8 and of 32 as the memory table says, memory of
a device, kernels and bytes of a micro-batch, what a device sends in a step, the samples that a node reads in a second,
memory of the evaluation, and GPU-hours. Launching, preemption and resuming are tested by gloo processes at tiny size,
by strategy: the table says how many of these tests passed. Nothing here was measured on a GPU.
`python benchmarks/node.py [--recipes NAME "NAME SETTING ..."] [--no-tests] [--tests-of JUNIT.xml]`
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from lib.full_scale import FullScale, full_scale
from lib.report import RESULTS, environment, keep, kept, table
from loader import loader_rates
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowmap.build.frozen import hold_frozen
from flowmap.estimate.communication import sent_in_a_step
from flowmap.estimate.dry_run import networks_costs, networks_memory, omitted_flops
from flowmap.estimate.evaluation import evaluation_bytes
from flowmap.estimate.networks import outline_of_network
from flowmap.estimate.price import Prices, hours
from flowmap.estimate.roofline import Traffic, step_of
from flowmap.recipe import read_recipe
from flowmap.train.sharding import mesh_of, shard, shard_frozen

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up: networks are made from the cards
ROOT = RESULTS.parents[1]
TESTS = tuple(f"tests/train/test_{name}.py" for name in ("launchers", "preemption", "processes", "sharded_runs"))
NODES = (1, 4)
VARIANTS = ("flux-dev-lora trainer.strategy=fsdp", "flux-dev-lora trainer.strategy=fsdp quantize.frozen=nf4")
COLUMNS = [
    *("recipe", "strategy", "starts", "GiB a GPU, 8 and 32", "text encoders, GiB", "kernels", "GB", "ms"),
    "samples/s: need, one core reads",
    *("evaluation, GiB: device + host", "GB sent a step, 8 and 32", "gloo tests passed", "GPU-hours"),
]


def weights_on_a_device(scale: FullScale) -> float:
    """The bytes of weights that fully_shard leaves on one device of a fake group of that many."""
    trainer = scale.recipe.trainer
    student, *teachers = map(outline_of_network, (scale.config, *scale.teachers))
    hold_frozen(scale.recipe, [one.requires_grad_(False) for one in teachers], student)
    if scale.recipe.lora is not None:  # the first teacher is the student's base
        teachers = teachers[1:]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=scale.recipe.batches.processes)
    try:
        mesh = mesh_of(trainer, "cpu")
        shard(student, mesh, dtype=torch.bfloat16 if trainer.precision == "bf16" else None)
        if teachers:
            shard_frozen(teachers, mesh)
        nets = nn.ModuleList([student, *teachers])
        parts = {id(p): p.to_local() for p in nets.parameters()}
        buffers = sum(b.numel() * b.element_size() for b in nets.buffers())
        return buffers + sum(p.numel() * p.element_size() for p in parts.values())
    finally:
        dist.destroy_process_group()


def on_nodes(name: str, nodes: int) -> list[str]:
    """The settings of the recipe on so many nodes: a smaller micro-batch where a step has too few samples for it."""
    data, trainer = read_recipe(name).data, read_recipe(name).trainer
    share = (data.global_batch_size or data.batch_size * trainer.devices * nodes) // (trainer.devices * nodes)
    return [f"trainer.num_nodes={nodes}", f"data.batch_size={min(data.batch_size, share)}"]


def examined(row: str) -> dict:
    """The row of a recipe, by its name and settings of it."""
    name, *settings = row.split()
    found: dict = {"recipe": row, "memory": {}, "weights": {}, "sent": {}}
    step_on_meta = None
    for nodes in NODES:
        scale = FullScale.of(name, overrides=[*on_nodes(name, nodes), *settings])
        world = scale.recipe.batches.processes
        costs = networks_costs(scale.run, scale.config)
        memory = networks_memory(scale.run, scale.config, costs)
        found["memory"][world] = memory.total
        found["text"] = memory.text
        step_on_meta = step_on_meta or step_of(scale.recipe, scale.config, scale.teachers, Prices().devices)
        sent = sent_in_a_step(scale.recipe.trainer, step_on_meta, scale.recipe.batches.accumulate)
        found["sent"][world] = [sent.within, sent.between]
        if scale.recipe.trainer.strategy == "fsdp":
            found["weights"][world] = [memory.weights + memory.frozen, weights_on_a_device(scale)]
        gc.collect()
    scale = FullScale.of(name, overrides=settings)
    recipe = scale.recipe
    assert step_on_meta is not None
    parts = step_on_meta.parts
    step = sum(parts.values(), Traffic())
    at_once = recipe.batches.processes * recipe.data.batch_size
    ends = parts["optimizer"].seconds + parts["averages"].seconds
    seconds = recipe.batches.accumulate * (step.seconds - ends) + ends
    evaluation = evaluation_bytes(scale.run, scale.config)
    return found | {
        "strategy": recipe.trainer.strategy,
        "batches": str(recipe.batches),
        "parts": {name: [part.kernels, part.bytes, part.seconds] for name, part in parts.items()},
        "kernels": step.kernels, "bytes": step.bytes, "seconds": step.seconds,
        "need": at_once * recipe.batches.accumulate / seconds,
        "evaluation": {"device": evaluation.device, "host": evaluation.host},
        "hours": hours(Prices().training(recipe, scale.config, scale.teachers, omitted_flops(recipe, costs))),
    }  # fmt: skip


def starts(row: dict) -> str:
    """ "yes", or what is wrong."""
    if "error" in row:
        return row["error"]
    wrong = [world for world, (said, there) in row["weights"].items() if abs(said / there - 1) > 0.01]
    return f"memory table is off in groups of {wrong}" if wrong else "yes"


def gloo_tests(done: Path | None) -> dict:
    """Outcomes of the tests that start processes: launchers, preemption, DDP and FSDP. done: a report of pytest's."""
    if done is not None:
        return _outcomes(done)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        there = [path for path in TESTS if (ROOT / path).is_file()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", *there]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        return _outcomes(report)


def _outcomes(report: Path) -> dict[str, str]:
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}": _outcome(case) for case in cases}


def _tested(strategy: str, tests: dict[str, str]) -> str:
    """How many of the tests that say nothing of the other strategy passed."""
    other = "fsdp" if strategy != "fsdp" else "ddp"
    counts = Counter(outcome for name, outcome in tests.items() if other not in name)
    return f"{counts['passed']} of {counts.total()}" if tests else "not run"


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def row_of(row: dict, rates: dict, tests: dict) -> list:
    if "kernels" not in row:
        return [row["recipe"], "", starts(row), *[""] * (len(COLUMNS) - 3)]
    gib = lambda size: size / 2**30
    memory = ", ".join(f"{gib(size):.1f}" for size in row["memory"].values())
    name = row["recipe"].split()[0]
    measured = rates.get(name, rates.get(name.partition("-")[0], {})).get("measured")  # variants read the same data
    reads = f"{row['need']:,.0f}, {f'{measured:,.0f}' if measured else '?'}"
    evaluation = f"{gib(row['evaluation']['device']):.1f} + {gib(row['evaluation']['host']):.1f}"
    sizes = [row["kernels"], round(row["bytes"] / 1e9), round(1e3 * row["seconds"])]
    text = f"{gib(row['text']):.1f}" if row["text"] else ""
    sent = ", ".join(" + ".join(f"{size / 1e9:.3g}" for size in each if size) for each in row["sent"].values())
    return [row["recipe"], row["strategy"], starts(row), memory, text, *sizes, reads, evaluation, sent,
            _tested(row["strategy"], tests), row["hours"].removesuffix(" GPU-hours")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", help="examine these, or none, and keep the other rows")
    parser.add_argument("--no-tests", action="store_true", help="keep the outcomes of the earlier tests")
    parser.add_argument("--tests-of", type=Path, help="pytest's --junitxml of these tests, in place of running them")
    a = parser.parse_args()
    before = kept(RESULTS / "node.json")
    rows = {row["recipe"]: row for row in before.get("recipes", [])}
    tests = before.get("tests", {})
    for name in (*full_scale(), *VARIANTS) if a.recipes is None else a.recipes:
        started = time.perf_counter()
        try:
            rows[name] = examined(name)
        except Exception as error:
            rows[name] = {"recipe": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(f"{name}: {starts(rows[name])}, {time.perf_counter() - started:.0f} s", flush=True)
        save(rows, tests)
    if not a.no_tests:
        tests = gloo_tests(a.tests_of)
        save(rows, tests)
    print(table([row_of(row, loader_rates(), tests) for row in rows.values()], COLUMNS))
    counts = Counter(tests.values())
    print("gloo tests:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "not run")


def save(rows: dict[str, dict], tests: dict[str, str]) -> None:
    """Write what is known so far; a later call replaces the rows that it examines."""
    lines = [row_of(row, loader_rates(), tests) for row in rows.values()]
    payload = {"columns": COLUMNS, "rows": lines, "recipes": list(rows.values()), "tests": tests}
    keep(RESULTS / "node.json", {"question": __doc__.splitlines()[0], "environment": environment(), **payload})


if __name__ == "__main__":
    main()
