"""`flowmap tune`: searches guidance scale, gamma and grid of a student for each number of steps, and keeps them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowmap.cli.arguments import device_of, student_argument
from flowmap.cli.terminal import log

if TYPE_CHECKING:
    from flowmap.evaluation.tune import Found, Search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    student_argument(parser)
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="default: the recipe's")
    what = "a distance in metrics.json, such as frechet_pixels (default: the recipe's first)"
    parser.add_argument("--metric", metavar="KEY", help=what)
    what = "samples of each candidate in the last round (default: the metric's)"
    parser.add_argument("--images", type=int, metavar="N", help=what)
    parser.add_argument("--scales", type=float, nargs="+", metavar="W", help="guidance scales to try")
    parser.add_argument("--gammas", type=float, nargs="+", metavar="G", help="amounts of noise between steps to try")
    parser.add_argument("--shifts", type=float, nargs="+", metavar="S", help="grids to try, as shifts of the even one")
    parser.add_argument("--seed", type=int, help="of the search's noise (default: that of evaluation, plus 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, and draw nothing")
    parser.add_argument("--no-write", action="store_true", help="print what is found, and write nothing")


def run(a: argparse.Namespace) -> int:
    from flowmap.evaluation.tune import SHIFTS, prepared, tune

    options = {name: getattr(a, name) for name in ("metric", "images", "scales", "gammas", "seed")}
    options |= {"device": device_of(a.device), "shifts": SHIFTS if a.shifts is None else a.shifts}
    if a.dry_run:
        print(plan(prepared(a.student, a.steps, **options)))
        return 0
    found = tune(a.student, a.steps, write=not a.no_write, log=log, **options)
    print(table(found))
    for one in found:
        steps = f"{one.best.steps} step{'s' * (one.best.steps > 1)}"
        if one.best == one.start:
            print(f"{steps}: nothing is better than the student's own settings")
            continue
        if others := others_of(one):
            print(f"{steps}, check: {others}")
        if not one.better:
            print(f"{steps}: no better in the check, so its settings are not kept")
    return 0


def plan(search: Search) -> str:
    """A line for each number of steps: how many settings are measured in each round, and the calls of the student."""
    lines = [f"by {search.key}; the student's own settings are measured in every round"]
    for steps, rounds in search.rounds():
        parts = ", ".join(f"{one.candidates} on {one.samples} samples" for one in rounds)
        drawn = sum((one.candidates + 1) * one.samples for one in rounds) + 2 * max(s.images for s in search.specs)
        lines.append(f"{steps} step{'s' * (steps > 1)}: settings {parts}; {steps * drawn:,} calls of the student")
    return "\n".join(lines)


def table(found: Sequence[Found]) -> str:
    """A row for each number of steps: the settings, and both distances before and after."""
    from flowmap.evaluation.tune import described

    lines: list[tuple[str, ...]] = [("settings", "search", "tuned", "check", "tuned")]
    for one in found:
        numbers = (*one.search, *(figures[one.key] for figures in one.check))
        lines.append((described(one.best), *(f"{value:.4g}" for value in numbers)))
    width = max(len(line[0]) for line in lines) + 2
    return "\n".join(first.ljust(width) + "".join(cell.rjust(9) for cell in cells) for first, *cells in lines)


def others_of(one: Found) -> str:
    """The other figures of the check, before and after."""
    before, after = one.check
    return ", ".join(f"{key} {before[key]:.3g} -> {after[key]:.3g}" for key in before if key != one.key)
