"""`flowmap compare`: trains recipes on equal terms and prints the table (flowmap/train/compare/)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowmap.cli.arguments import import_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A comparison that was cut off goes on where it stopped."
    parser.add_argument("--recipes", required=True, nargs="+", metavar="NAME|PATH", help="recipes of the same data and the same teacher")
    terms = parser.add_mutually_exclusive_group(required=True)
    terms.add_argument("--budget", type=float, metavar="SECONDS", help="seconds of training for each recipe and seed")
    terms.add_argument("--calls", type=float, metavar="N", help="network evaluations for each instead, a backward pass counted as two")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1, each with a teacher of its own (default: 5)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="steps at which students are measured")
    parser.add_argument("--out", metavar="DIR", help="folder for runs, table and plot (default: runs/compare)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and what is missing; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value|+FILE", help="settings that replace every recipe's")
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.train.compare import compare, dry_compare

    names = a.recipes
    options: dict[str, Any] = dict(budget=a.budget, calls=a.calls, seeds=a.seeds, steps=a.steps, out=a.out, overrides=a.overrides)
    if a.dry_run:
        from flowmap.planning.dry_run import MISSING

        lines = dry_compare(names, **options)
        print("\n".join(lines))
        return 3 if any(line.startswith(MISSING) for line in lines) else 0
    folder = Path(compare(names, **options)["folder"])
    print((folder / "table.md").read_text(encoding="utf-8"), end="")
    print(f"\n{folder}: compare.json, table.md, quality.png")
    return 0
