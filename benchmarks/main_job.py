"""Does the default recipe do what it is for?  digits from nothing, five seeds: time, memory, Frechet distances.

Time is wall time; distances are of student and teacher. Every seed trains its own teacher and student in a fresh
process.  Distances are on pixels scaled to unit std, from the same noise for every row.  They are to held-out digits,
which no network was trained on, and in the last column to training ones; at the recipe's sizes and for 2,000 samples.
A finished seed is kept in runs/bench and not run again, unless --anew; its figures are computed again if the kept ones
are to training digits alone.
--look-again evaluates finished seeds again with the sampler of today's recipe (all else in it must be unchanged).
--against NAME: also compare with another recipe with kept runs, seed by seed; both have the same teacher in a seed.
`python benchmarks/main_job.py [--seeds 5] [--recipe digits] [--anew] [--look-again] [--against digits-ayf-emd]`
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lib.report import environment, keep, kept, spread, table, write

NAME = "frechet_pixels"  # to held-out digits; with _train to those of training
SUFFIXES = ("", "_train")
LARGE = 2000  # samples of the second look
KEPT = Path("runs/bench")  # steps_law.py takes the teachers and students from here


def run(recipe: str, seed: int, root: Path) -> dict:
    """One seed in a process of its own: seconds of wall, peak GiB, and the figures; kept in result.json."""
    out = root / f"seed-{seed}" / recipe
    shutil.rmtree(out.parent, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "flowmap",
        "fit",
        "--recipe",
        recipe,
        f"seed={seed}",
        f"teacher.overrides=[seed={seed}]",
        "--out",
        str(out),
    ]
    started = time.perf_counter()
    env = os.environ | {"FLOWMAP_RUNS": str(out.parent), "WANDB_MODE": "offline"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return looked_at(out, {"seed": seed, "wall_seconds": wall, "peak_gib": peak})


def looked_at(out: Path, result: dict) -> dict:
    """The result with the figures of a look in a process of its own; kept in result.json."""
    env = os.environ | {"FLOWMAP_RUNS": str(out.parent)}
    extra = subprocess.run(
        [sys.executable, __file__, "--look", str(out)], check=True, env=env, stdout=subprocess.PIPE, text=True
    )
    result |= json.loads(extra.stdout.splitlines()[-1])
    keep(out.parent / "result.json", result)
    return result


def look(out: Path) -> dict:
    """The figures of a finished run, with 8 and 16 steps, without guidance (scale 1), and with more samples."""
    from dataclasses import replace

    from flowmap.build.data import build_data
    from flowmap.build.teacher import build_teacher
    from flowmap.evaluation.measure import measure
    from flowmap.metrics import Frechet
    from flowmap.plan.plan import resolve
    from flowmap.recipe.recipe import read_recipe, read_resolved
    from flowmap.student.folder import load_student

    figures = json.loads((out / "metrics.json").read_text())
    recipe, student = read_resolved(out / "recipe.yaml"), load_student(out / "student")
    now = read_recipe(recipe.name, [f"seed={recipe.seed}", f"teacher.overrides=[seed={recipe.seed}]"])
    if replace(recipe, sampler=now.sampler).hash() != now.hash():
        raise SystemExit(f"{out}: the recipe has changed in more than its sampler; --anew trains it again")
    data, teacher = build_data(resolve(recipe)), build_teacher(resolve(recipe))
    train_seconds = figures["seconds"]["train"]
    only = [spec for spec in recipe.metrics if spec.on_samples][:1]
    if recipe.sampler != now.sampler:  # --look-again
        recipe = replace(recipe, sampler=now.sampler)
        figures |= measure(recipe, student, teacher, data, metrics=only)
    elif f"{NAME}_train" not in figures["floor"]:  # measured before distances were to held-out digits
        figures |= measure(recipe, student, teacher, data, metrics=only)
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, teacher_extra_steps=()))
    more = measure(recipe, student, None, data, steps=[8, 16], metrics=only)["student"]
    unguided = measure(recipe, student, teacher, data, steps=[1, 2, 4], metrics=only, guidance=1.0)
    large = measure(recipe, student, teacher, data, steps=[1, 2, 4, 8, 16], metrics=[Frechet(images=LARGE)])
    found = {"train_seconds": train_seconds}
    for suffix in SUFFIXES:
        name = NAME + suffix
        rows = rows_of(figures, name) | {f"student {k}": row[name] for k, row in more.items()}
        rows |= {f"teacher {k}": row[name] for k, row in figures.get("teacher_few", {}).items()}
        rows |= {
            f"{key}, scale 1": value for key, value in rows_of(unguided, name).items() if not key.startswith("floor")
        }
        found |= {f"frechet{suffix}": rows, f"frechet_large{suffix}": rows_of(large, name)}
    return found


def rows_of(figures: dict, name: str) -> dict[str, float]:
    rows = {f"student {k}": row[name] for k, row in figures["student"].items()}
    rows |= {f"teacher {figures['teacher']['steps']}": figures["teacher"][name], "floor": figures["floor"][name]}
    return rows | {"floor, standard deviation": figures["floor"][f"{name}_std"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--look-again", action="store_true")
    parser.add_argument("--against", metavar="NAME")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        print(json.dumps(look(arguments.look)))
        return
    runs = []
    for seed in range(arguments.seeds):
        done = KEPT / arguments.recipe / f"seed-{seed}" / "result.json"
        before = {} if arguments.anew else kept(done)
        runs.append(before or run(arguments.recipe, seed, KEPT / arguments.recipe))
        if before and (arguments.look_again or "frechet_train" not in before):
            runs[-1] = looked_at(done.parent / arguments.recipe, runs[-1])
        print(f"seed {seed}: {runs[-1]['wall_seconds']:.0f} s, {runs[-1]['frechet']}", flush=True)
    report(arguments.recipe, runs)
    if arguments.against:
        others = [kept(KEPT / arguments.against / f"seed-{seed}" / "result.json") for seed in range(arguments.seeds)]
        if not all(others):
            makes = f"`python benchmarks/main_job.py --recipe {arguments.against}`"
            raise SystemExit(f"--against: runs of {arguments.against} are missing: {makes} makes them")
        compare(arguments.recipe, runs, arguments.against, others)


def report(recipe: str, runs: list[dict]) -> None:
    rows = over_seeds(runs, "frechet", "the recipe's") + over_seeds(runs, "frechet_large", f"{LARGE} samples")
    columns = ["sizes", "row", "median", "least", "most", "median ratio to teacher 64", "to training digits, median"]
    print(table(rows, columns))
    walls, peaks = [r["wall_seconds"] for r in runs], [r["peak_gib"] for r in runs]
    print(
        f"wall seconds: median {statistics.median(walls):.0f}, most {max(walls):.0f}; "
        f"peak memory {max(peaks):.2f} GiB; {len(runs)} seeds"
    )
    payload = {"environment": environment(), "seeds": len(runs), "columns": columns, "rows": rows, "runs": runs}
    write(f"main_job_{recipe}", {"question": __doc__.splitlines()[0], **payload})


def compare(recipe: str, runs: list[dict], against: str, others: list[dict]) -> None:
    """A row for each sizes and number of steps: both medians, the ratio within a seed, and the seeds the first wins."""
    rows = []
    frechets = (("frechet", "the recipe's"), ("frechet_large", f"{LARGE} samples"))
    looks = [(f"{key}{suffix}", f"{sizes}{suffix.replace('_train', ', training digits')}")
             for suffix in SUFFIXES for key, sizes in frechets]  # fmt: skip
    for key, sizes in looks:
        for name in (name for name in runs[0][key] if name.removeprefix("student ").isdigit() or name == "teacher 64"):
            mine, other = [[run[key][name] for run in found] for found in (runs, others)]
            ratios = [a / b for a, b in zip(mine, other, strict=True)]
            ahead = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
            rows.append([sizes, name, statistics.median(mine), statistics.median(other), spread(ratios), ahead])
    columns = ["sizes", "row", recipe, against, "ratio within a seed", "seeds ahead"]
    print(table(rows, columns))
    payload = {
        "environment": environment(),
        "settings": {"seeds": list(range(len(runs)))},
        "columns": columns,
        "rows": rows,
    }
    write("main_job_against", {"question": "The default recipe and another, at full length.", **payload})


def over_seeds(runs: list[dict], key: str, sizes: str) -> list[list]:
    rows, base = [], [r[key]["teacher 64"] for r in runs]
    for name in runs[0][key]:
        values = [r[key][name] for r in runs]
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        trained = statistics.median(r[f"{key}_train"][name] for r in runs)
        rows.append([sizes, name, statistics.median(values), min(values), max(values), ratio, trained])
    return rows


if __name__ == "__main__":
    main()
