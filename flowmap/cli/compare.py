"""`flowmap compare`: trains recipes on equal terms, or tabulates finished runs (flowmap/compare/)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowmap.cli.arguments import import_argument

STEPS, SEEDS = [1, 2, 4, 8], 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A comparison that was cut off goes on where it stopped."
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipes", nargs="+", metavar="NAME|PATH", help="recipes of the same data and the same teacher")
    what.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="finished runs, whose metrics.json are put side by side; trains nothing",
    )
    terms = parser.add_mutually_exclusive_group()
    terms.add_argument("--budget", type=float, metavar="SECONDS", help="seconds of training for each recipe and seed")
    calls = "network evaluations for each instead, a backward pass counted as two"
    terms.add_argument("--calls", type=float, metavar="N", help=calls)
    add("--seeds", type=int, metavar="N", help=f"seeds 0 to N - 1, each with a teacher of its own (default: {SEEDS})")
    steps = " ".join(map(str, STEPS))
    add(
        "--steps",
        type=int,
        nargs="+",
        metavar="K",
        help=f"steps of the table (default: {steps}; of runs: all that they have)",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder for runs, table and plot (default: runs/compare; with --runs: none, the table is printed)",
    )
    add("--dry-run", action="store_true", help="print what would be trained and what is missing; train nothing")
    add("overrides", nargs="*", metavar="key=value|+FILE", help="settings that replace every recipe's")
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    if a.runs is not None:
        return _of_runs(a)
    from flowmap.compare import compare, dry_compare

    seeds, steps = SEEDS if a.seeds is None else a.seeds, STEPS if a.steps is None else a.steps
    options: dict[str, Any] = dict(budget=a.budget, calls=a.calls, seeds=seeds, steps=steps, out=a.out)
    options["overrides"] = a.overrides
    if a.dry_run:
        from flowmap.estimate.dry_run import MISSING

        lines = dry_compare(a.recipes, **options)
        print("\n".join(lines))
        return 3 if any(line.startswith(MISSING) for line in lines) else 0
    folder = Path(compare(a.recipes, **options)["folder"])
    print((folder / "table.md").read_text(encoding="utf-8"), end="")
    print(f"\n{folder}: compare.json, table.md, quality.png")
    return 0


def _of_runs(a: argparse.Namespace) -> int:
    given = {"--budget": a.budget, "--calls": a.calls, "--seeds": a.seeds, "--dry-run": a.dry_run or None}
    given |= dict.fromkeys(a.overrides, True)
    for what in (what for what, value in given.items() if value is not None):
        raise ValueError(f"{what}: is for training, and --runs trains nothing")
    from flowmap.compare.finished import REPORT, compare_runs

    print(compare_runs(a.runs, steps=a.steps, out=a.out), end="")
    if a.out is not None:
        print(f"\n{a.out}: {', '.join(REPORT)}")
    return 0
