"""`flowmap tune`: searches guidance scale, gamma and grid of a student for each number of steps, and keeps them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowmap.cli.arguments import device_of, student_argument
from flowmap.cli.terminal import log

if TYPE_CHECKING:
    from flowmap.evaluation.tune import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    student_argument(parser)
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="default: the recipe's")
    what = "a distance in metrics.json, such as frechet_pixels (default: the recipe's first)"
    parser.add_argument("--metric", metavar="KEY", help=what)
    parser.add_argument("--images", type=int, metavar="N", help="samples of each candidate (default: the metric's)")
    parser.add_argument("--scales", type=float, nargs="+", metavar="W", help="guidance scales to try")
    parser.add_argument("--gammas", type=float, nargs="+", metavar="G", help="amounts of noise between steps to try")
    parser.add_argument("--seed", type=int, help="of the search's noise (default: that of evaluation, plus 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="print what is found, and write nothing")


def run(a: argparse.Namespace) -> int:
    from flowmap.evaluation.tune import GAMMAS, tune

    options = {name: getattr(a, name) for name in ("metric", "images", "scales", "seed")}
    gammas = GAMMAS if a.gammas is None else a.gammas
    device, write = device_of(a.device), not a.dry_run
    found = tune(a.student, a.steps, gammas=gammas, device=device, write=write, log=log, **options)
    print(table(found))
    for one in found:
        if not one.better:
            print(f"{one.best.steps} steps: no better in the check, so its settings are not kept")
    return 0


def table(found: Sequence[Found]) -> str:
    """A row for each number of steps: the settings, and both distances before and after."""
    from flowmap.evaluation.tune import described

    lines: list[tuple[str, ...]] = [("settings", "search", "tuned", "check", "tuned")]
    for one in found:
        numbers = (one.before[0], one.after[0], one.before[1], one.after[1])
        lines.append((described(one.best), *(f"{value:.4g}" for value in numbers)))
    width = max(len(line[0]) for line in lines) + 2
    return "\n".join(first.ljust(width) + "".join(cell.rjust(9) for cell in cells) for first, *cells in lines)
