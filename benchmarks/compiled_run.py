"""Does trainer.compile pay in a whole run?  A recipe trained by eager and by compiled steps, in CPU seconds.

Each way trains in a fresh process of one thread, without compiled code from before; compilers run in that process, so
that its CPU seconds count them. The teacher is trained once for both. Seconds of training are those of its steps, with
compiling and without pictures and figures; the time of a step is that of the second half of them. Figures are those of
metrics.json. A finished run is kept in runs/bench and not run again, unless --anew.
`python benchmarks/compiled_run.py [--recipe digits] [--seed 0] [--ways eager compiled] [--anew] [KEY=VALUE ...]`
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lib.report import environment, keep, kept, table, write

KEPT = Path("runs/bench/compiled")
WAYS = {"eager": "false", "compiled": "true"}
COLUMNS = ["way", "CPU s, steps", "CPU ms, a step", "CPU s, compiling", "graphs", "uncompiled calls", "CPU s, run"]


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

    class Marks(Clock):
        marks: list[float] = []

        def on_train_batch_end(self, *args) -> None:
            super().on_train_batch_end(*args)
            self.marks.append(self.seconds)

    torch.set_num_threads(1)
    ways: list = []
    stage.report = lambda found, log: ways.extend(found)
    recipe = flowmap.read_recipe(
        arguments.recipe, [*arguments.settings, f"seed={arguments.seed}", f"trainer.compile={WAYS[way]}"]
    )
    clock = Marks(now=cpu_seconds)
    log = lambda line: print(f"{way} {cpu_seconds():7.0f} s  {line}", flush=True)
    flowmap.fit(recipe, out, clock=clock, overwrite=True, log=log)
    half = len(clock.marks) // 2
    step = (clock.marks[-1] - clock.marks[half - 1]) / (len(clock.marks) - half)
    counts = {"graphs": sum(one.graphs for one in ways), "fallbacks": sum(one.fallbacks for one in ways)}
    figures = json.loads((out / "metrics.json").read_text())
    found = {"steps": len(clock.marks), "train": clock.seconds, "step": step, **counts, "run": cpu_seconds()}
    keep(out / "result.json", {**found, "environment": environment(), "metrics": figures})


def report(name: str, found: dict[str, dict], seed: int) -> None:
    """Print the tables of costs and figures and write the JSON."""
    rows, figures = [], []
    for way, one in found.items():
        beyond = one["train"] - one["steps"] * one["step"] if one["graphs"] else 0.0
        counts = [one["graphs"], one["fallbacks"]]
        rows.append([way, one["train"], 1e3 * one["step"], beyond, *counts, one["run"]])
        student = one["metrics"]["student"]
        columns = ["way", "steps", *next(iter(student.values()))]
        figures += [[way, steps, *(values.get(key, "") for key in columns[2:])] for steps, values in student.items()]
    print(table(rows, COLUMNS))
    print(table(figures, columns))
    payload = {"question": __doc__.splitlines()[0], "environment": environment(), "setting": {"seed": seed}}
    tables = {"cost": {"columns": COLUMNS, "rows": rows}, "figures": {"columns": columns, "rows": figures}}
    write(f"compiled_run_{name}", {**payload, "runs": found, "tables": tables})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.ways[0], arguments.child, arguments)
        return
    root = KEPT / arguments.recipe / f"seed-{arguments.seed}"
    for way in arguments.ways:
        if arguments.anew or not kept(root / way / "result.json"):
            shutil.rmtree(root / way, ignore_errors=True)
            run(way, root.absolute(), arguments)
    if all(found := {way: kept(root / way / "result.json") for way in WAYS}.values()):
        report(arguments.recipe, dict(zip(WAYS, found, strict=True)), arguments.seed)


if __name__ == "__main__":
    main()
