"""Does trainer.compile pay in a whole run?  Runs of a recipe by eager and by compiled steps, and the cost of a step.

Everything is of one thread, in CPU seconds, without compiled code from before; compilers run in the same process, so
that its seconds count them. Each way trains in a fresh process; the teacher is trained once for all. Seconds of
training are those of its steps, with compiling and without pictures and figures. A finished run is kept in runs/bench
and not run again, unless --anew.
--cost: eager and compiled steps in turn, on the same batches, by random networks of the recipes' sizes.
`python benchmarks/compiled_run.py [--recipe digits] [--seed 0] [--ways eager compiled] [--anew] [KEY=VALUE ...]`
`python benchmarks/compiled_run.py --cost digits fashion14 [--rounds 40]`
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lib.report import RESULTS, environment, keep, kept, table, write

KEPT = Path("runs/bench/compiled")
WARM = 3  # steps that are not counted
WAYS = {"eager": "false", "compiled": "true"}
COLUMNS = ["way", "training steps", "sampling steps", "CPU s, training", "graphs"]
COST = ["recipe", "rounds", "ms, eager", "ms, compiled", "compiled / eager", "lower quartile", "upper quartile"]
COST += ["graphs", "s, compiling", "steps that pay for it"]


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children, which compile."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run(way: str, root: Path, arguments) -> dict:
    """One way in a process of its own; kept in result.json."""
    command = [sys.executable, __file__, "--recipe", arguments.recipe, "--seed", str(arguments.seed), "--ways", way]
    with tempfile.TemporaryDirectory() as empty:
        env = os.environ | {"FLOWMAP_RUNS": str(root), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        env |= {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        subprocess.run([*command, "--child", str(root / way), *arguments.settings], check=True, env=env)
    return kept(root / way / "result.json")


def child(way: str, out: Path, arguments) -> None:
    """Train and measure; leaves result.json in the run's folder."""
    import torch

    import flowmap
    from flowmap.train import stage
    from flowmap.train.clock import Clock

    torch.set_num_threads(1)
    ways: list = []
    stage.report = lambda found, log: ways.extend(found)
    recipe = flowmap.read_recipe(
        arguments.recipe, [*arguments.settings, f"seed={arguments.seed}", f"trainer.compile={WAYS[way]}"]
    )
    clock = Clock(now=cpu_seconds)
    log = lambda line: print(f"{way} {cpu_seconds():7.0f} s  {line}", flush=True)
    flowmap.fit(recipe, out, clock=clock, overwrite=True, log=log)
    counts = {"graphs": sum(one.graphs for one in ways), "fallbacks": sum(one.fallbacks for one in ways)}
    figures = json.loads((out / "metrics.json").read_text())
    found = {"steps": clock.steps, "train": clock.seconds, **counts, "run": cpu_seconds()}
    keep(out / "result.json", {**found, "environment": environment(), "metrics": figures})


def report(name: str, seed: int, found: dict[str, dict]) -> None:
    """Print the table and write the JSON."""
    figures = next(iter(found.values()))["metrics"]["student"]["1"]
    names = [key for key in figures if key.startswith(("frechet", "recall"))]
    rows = []
    for way, one in found.items():
        for steps, figures in one["metrics"]["student"].items():
            rows.append([way, one["steps"], steps, one["train"], one["graphs"], *(figures[key] for key in names)])
    print(table(rows, [*COLUMNS, *names]))
    payload = {"question": __doc__.splitlines()[0], "environment": next(iter(found.values()))["environment"]}
    made = {"columns": [*COLUMNS, *names], "rows": rows}
    write(f"compiled_run_{name}", {**payload, "setting": {"seed": seed}, **made, "kept": found})


def cost(names: list[str], rounds: int) -> None:
    """Each recipe in a process of its own: the table, and the JSON, which keeps the rows of others."""
    rows = [row for row in kept(RESULTS / "compiled_cost.json").get("rows", []) if row[0] not in names]
    for name in names:
        with tempfile.TemporaryDirectory() as empty:
            env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": empty}
            env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--child", empty, "--cost", name, "--rounds", str(rounds)]
            rows.append(json.loads(subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout))
    print(table(rows, COST))
    payload = {"question": __doc__.splitlines()[0], "environment": environment()}
    write("compiled_cost", {**payload, "setting": {"clock": "CPU time"}, "columns": COST, "rows": rows})


def cost_of(name: str, rounds: int) -> list:
    """The row of a recipe."""
    import torch
    from lib.full_scale import FullScale

    from flowmap.build.teacher import teacher_of_networks
    from flowmap.student.examples import conditions_of
    from flowmap.train.compiling import compile_networks
    from flowmap.train.draw import draw_sample, generator_for

    torch.set_num_threads(1)
    settings = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.compile=true"]
    scale = FullScale.of(name, overrides=settings)
    recipe, cpu = scale.recipe, torch.device("cpu")
    made = {}
    for way in WAYS:
        torch.manual_seed(0)
        frozen = [one.build().eval().requires_grad_(False) for one in scale.teachers]
        made[way] = scale.config.build().train(), teacher_of_networks(recipe, frozen, {})
    log = lambda line: print(f"{name} {cpu_seconds():7.0f} s  {line}", file=sys.stderr, flush=True)
    student, teacher = made["compiled"]
    ways = compile_networks(recipe, "cpu", [student], teacher.modules, log)
    x0 = torch.randn(scale.rows, *scale.config.shape)
    cond = {key: value for key, value in conditions_of(scale.config, scale.rows).items() if key != "guidance"}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    compiling = 0.0
    for step in range(1, rounds + WARM):
        sample = draw_sample(recipe, x0, cond, generator_for(0, step, step * scale.rows, scale.rows, cpu))
        for way, (student, teacher) in made.items():
            graphs, since = sum(one.graphs for one in ways), cpu_seconds()
            recipe.objective(student, teacher.in_training(recipe.teacher), sample, step).value.backward()
            student.zero_grad(set_to_none=True)
            took = cpu_seconds() - since
            if sum(one.graphs for one in ways) > graphs:
                compiling += took
            elif step >= WARM:
                seconds[way].append(took)
    assert not any(one.fallbacks for one in ways), [one.stopped for one in ways]
    eager, fused = (statistics.median(seconds[way]) for way in WAYS)
    found = sorted(b / a for a, b in zip(seconds["eager"], seconds["compiled"], strict=False))
    spread = [statistics.median(found), found[len(found) // 4], found[-1 - len(found) // 4]]
    graphs = sum(one.graphs for one in ways)
    return [
        name,
        rounds,
        1e3 * eager,
        1e3 * fused,
        *spread,
        graphs,
        compiling,
        round(compiling / max(eager - fused, 1e-9)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--cost", nargs="+", metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.cost:
        out = (
            cost_of(arguments.cost[0], arguments.rounds) if arguments.child else cost(arguments.cost, arguments.rounds)
        )
        print(json.dumps(out)) if arguments.child else None
        return
    if arguments.child:
        child(arguments.ways[0], arguments.child, arguments)
        return
    root = KEPT / arguments.recipe / f"seed-{arguments.seed}"
    for way in arguments.ways:
        if arguments.anew or not kept(root / way / "result.json"):
            shutil.rmtree(root / way, ignore_errors=True)
            run(way, root.absolute(), arguments)
    found = {way: kept(root / way / "result.json") for way in WAYS}
    report(arguments.recipe, arguments.seed, {way: one for way, one in found.items() if one})


if __name__ == "__main__":
    main()
