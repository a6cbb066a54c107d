"""Which objective is best at 1, 2 and 4 steps for the same work?  digits, five seeds, one teacher a seed, every objective at 1, 2, 4, 8 steps.

By `flowmap compare`: equal seconds of training, or with --calls equal network evaluations; quality, cost, memory, runs that diverged.  Machines
are shared, so the seconds are the process's CPU seconds (--wall: those of the clock on the wall).  Teachers that main_job.py has trained are taken
over.  What is finished is kept in runs/league: the same command goes on where it was cut off.
`python benchmarks/league.py [--seeds 5] [--budget 240 | --calls 1.4e6] [--wall] [--recipes digits digits-scm] [--out runs/league]`
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from _report import environment, table, write

from flowmap.planning.plan import dependency_folder, holds, is_complete, runs_root, teacher_recipes
from flowmap.train.compare import compare
from flowmap.train.compare.entrants import at_seed, read_entrants

DEFAULT = "digits"  # the recipe that must be the best, or within noise of it, at 2 and 4 steps
RECIPES = (
    DEFAULT,
    *(f"digits-{name}" for name in ("ayf-lmd", "ayf-mixed", "warm", "cmt", "meanflow", "imeanflow", "scm", "consistency")),
    *(f"digits-{name}" for name in ("esd", "lsd", "psd", "shortcut", "freeflow", "dmd")),
    "rfpp/digits",
)
METRIC = "frechet_pixels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    terms = parser.add_mutually_exclusive_group()
    terms.add_argument("--budget", type=float, help="seconds of training for each recipe and seed (default: 240)")
    terms.add_argument("--calls", type=float, help="network evaluations instead")
    parser.add_argument("--wall", action="store_true", help="seconds as the wall clock shows them: on a GPU, or a machine of one's own")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--out", type=Path, help="default: runs/league")
    a = parser.parse_args()
    budget = 240.0 if a.budget is None and a.calls is None else a.budget
    for seed in range(a.seeds):
        take_over(a.recipes, seed)
    now = time.perf_counter if a.wall else time.process_time
    found = compare(a.recipes, budget=budget, calls=a.calls, seeds=a.seeds, out=a.out or runs_root() / "league", now=now)
    rows, columns = rows_of(found)
    print(table(rows, columns))
    best = best_of(found)
    print(table(best, BEST))
    payload = {"environment": environment(), "seconds": "wall" if a.wall else "cpu", "columns": columns, "rows": rows, "best": best, **found}
    write("league_digits", {"question": __doc__.splitlines()[0], **payload})


def take_over(recipes, seed: int) -> None:
    """Copies the teachers of that seed that main_job.py trained to where the recipes look for them."""
    for recipe in read_entrants(recipes):
        for teacher in teacher_recipes(at_seed(recipe, seed)):
            target = dependency_folder(teacher)
            for folder in [] if is_complete(target, teacher) else Path(f"runs/bench/digits/seed-{seed}").glob(f"{teacher.name}-*"):
                if holds(folder, teacher):
                    shutil.copytree(folder, target, dirs_exist_ok=True)


def rows_of(found: dict) -> tuple[list[list], list[str]]:
    """A row for each recipe, and for teacher and floor, and number of steps: median, least, most; what the recipe cost."""
    columns = ["row", "steps", "median", "least", "most", "finished", "diverged", "train seconds", "own seconds", "optimiser steps", "peak GiB"]
    rows = []
    for name, one in found["recipes"].items():
        cost = [one["cost"][key]["median"] if key in one["cost"] else "" for key in ("train_seconds", "own_seconds", "steps", "peak_gib")]
        for k, figures in one["figures"].items():
            if METRIC in figures:
                spread = figures[METRIC]
                rows.append([name, int(k), *(spread[key] for key in ("median", "least", "most", "count")), one["diverged"], *cost])
        if not any(one["figures"].values()):
            rows.append([name, "", "", "", "", 0, one["diverged"], *cost])
    for label, row in found["beside"].items():
        rows.append([label, "", *(row[METRIC][key] for key in ("median", "least", "most", "count")), "", "", "", "", ""])
    return rows, columns


BEST = ["steps", "best", "median", f"median of {DEFAULT}", f"{DEFAULT} within the best's spread", f"seeds in which {DEFAULT} is behind"]


def best_of(found: dict) -> list[list]:
    """At each number of steps the recipe with the least median, and how the default stands to it, seed by seed."""
    by_run = {(r["recipe"], r["seed"]): r["figures"] for r in found["results"]}
    rows = []
    for k in map(str, found["terms"]["steps"]):
        known = {name: one["figures"][k][METRIC] for name, one in found["recipes"].items() if METRIC in one["figures"][k]}
        if DEFAULT not in known:
            continue
        best = min(known, key=lambda name: known[name]["median"])
        pairs = [(by_run.get((DEFAULT, seed), {}).get(k), by_run.get((best, seed), {}).get(k)) for seed in range(found["terms"]["seeds"])]
        behind = sum(mine[METRIC] > other[METRIC] for mine, other in pairs if mine and other)
        ours = known[DEFAULT]["median"]
        within = "yes" if ours <= known[best]["most"] else "no"
        rows.append([int(k), best, known[best]["median"], ours, within, f"{behind} of {sum(bool(m and o) for m, o in pairs)}"])
    return rows


if __name__ == "__main__":
    main()
