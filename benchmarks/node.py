"""Would every full-scale recipe come through on a node of 8 GPUs, and on 4 nodes?  Counted on a machine without a GPU.

For each recipe, from its real classes at full size on torch's meta device: whether student, teacher and one training
step can be made, whether the weights split over fake process groups of 8 and of 32 as the memory table says, memory of
a device, kernels and bytes of a micro-batch, the samples that a node reads in a second, memory of the evaluation, and
GPU-hours. Launching, preemption and resuming are tested by gloo processes at tiny size: the table says which of these
tests passed. Nothing here was measured on a GPU.
`python benchmarks/node.py [--recipes NAME "NAME SETTING ..."] [--no-tests]`
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
from flowmap.estimate.dry_run import networks_costs, networks_memory
from flowmap.estimate.evaluation import evaluation_bytes
from flowmap.estimate.networks import outline_of_network
from flowmap.estimate.price import Prices, hours
from flowmap.estimate.roofline import Traffic, step_traffic
from flowmap.recipe import read_recipe
from flowmap.train.sharding import mesh_of, shard, shard_frozen

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up: networks are made from the cards
ROOT = RESULTS.parents[1]
TESTS = ("tests/train/test_launchers.py", "tests/train/test_preemption.py", "tests/train/test_processes.py")
NODES = (1, 4)
VARIANTS = ("flux-dev-lora trainer.strategy=fsdp", "flux-dev-lora trainer.strategy=fsdp quantize.frozen=nf4")
COLUMNS = [
    *("recipe", "strategy", "starts", "GiB a GPU, 8 and 32", "kernels", "GB", "ms", "samples/s: need, one core reads"),
    *("evaluation, GiB: device + host", "GPU-hours"),
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
    found: dict = {"recipe": row, "memory": {}, "weights": {}}
    for nodes in NODES:
        scale = FullScale.of(name, overrides=[*on_nodes(name, nodes), *settings])
        world = scale.recipe.batches.processes
        costs = networks_costs(scale.run, scale.config)
        memory = networks_memory(scale.run, scale.config, costs)
        found["memory"][world] = memory.total
        if scale.recipe.trainer.strategy == "fsdp":
            found["weights"][world] = [memory.weights + memory.frozen, weights_on_a_device(scale)]
        gc.collect()
    scale = FullScale.of(name, overrides=settings)
    recipe = scale.recipe
    parts = step_traffic(recipe, scale.config, scale.teachers)
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
        "hours": hours(Prices().training(recipe, scale.config, scale.teachers)),
    }  # fmt: skip


def starts(row: dict) -> str:
    """ "yes", or what is wrong."""
    if "error" in row:
        return row["error"]
    wrong = [world for world, (said, there) in row["weights"].items() if abs(said / there - 1) > 0.01]
    return f"memory table is off in groups of {wrong}" if wrong else "yes"


def gloo_tests() -> dict:
    """Outcomes of the tests that start processes: launchers, preemption, DDP and FSDP."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        there = [path for path in TESTS if (ROOT / path).is_file()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", *there]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {
            f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}": _outcome(case) for case in cases
        }


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def row_of(row: dict, rates: dict) -> list:
    if "kernels" not in row:
        return [row["recipe"], "", starts(row), *[""] * 7]
    gib = lambda size: size / 2**30
    memory = ", ".join(f"{gib(size):.1f}" for size in row["memory"].values())
    measured = rates.get(row["recipe"].split()[0], {}).get("measured")
    reads = f"{row['need']:,.0f}, {f'{measured:,.0f}' if measured else '?'}"
    evaluation = f"{gib(row['evaluation']['device']):.1f} + {gib(row['evaluation']['host']):.1f}"
    sizes = [row["kernels"], round(row["bytes"] / 1e9), round(1e3 * row["seconds"])]
    return [row["recipe"], row["strategy"], starts(row), memory, *sizes, reads, evaluation,
            row["hours"].removesuffix(" GPU-hours")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=None)
    parser.add_argument("--no-tests", action="store_true", help="keep the outcomes of the earlier tests")
    a = parser.parse_args()
    before = kept(RESULTS / "node.json")
    rows = {row["recipe"]: row for row in before.get("recipes", [])}
    tests = before.get("tests", {})
    for name in a.recipes or (*full_scale(), *VARIANTS):
        started = time.perf_counter()
        try:
            rows[name] = examined(name)
        except Exception as error:
            rows[name] = {"recipe": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(f"{name}: {starts(rows[name])}, {time.perf_counter() - started:.0f} s", flush=True)
        save(rows, tests)
    if not a.no_tests:
        tests = gloo_tests()
        save(rows, tests)
    print(table([row_of(row, loader_rates()) for row in rows.values()], COLUMNS))
    counts = Counter(tests.values())
    print("gloo tests:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "not run")


def save(rows: dict[str, dict], tests: dict[str, str]) -> None:
    """Write what is known so far; a later call replaces the rows that it examines."""
    lines = [row_of(row, loader_rates()) for row in rows.values()]
    payload = {"columns": COLUMNS, "rows": lines, "recipes": list(rows.values()), "tests": tests}
    keep(RESULTS / "node.json", {"question": __doc__.splitlines()[0], "environment": environment(), **payload})


if __name__ == "__main__":
    main()
