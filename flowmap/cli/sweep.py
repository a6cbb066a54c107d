"""`flowmap sweep`: writes the file of a W&B sweep over a recipe's settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowmap.cli.arguments import recipe_arguments

MADE_BY = "# A sweep of W&B, written by `flowmap sweep`.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A setting of the sweep is key=a,b,c or key=low..high (low..high:log); the others are fixed."
    recipe_arguments(parser)
    what = "a figure of metrics.json, such as frechet_pixels (default: the recipe's first distance, if any)"
    parser.add_argument("--metric", metavar="KEY", help=what)
    parser.add_argument("--steps", type=int, metavar="K", help="its number of steps (default: the fewest)")
    what = "bayes, random or grid (default: bayes if there is a range, otherwise grid)"
    parser.add_argument("--method", metavar="NAME", help=what)
    parser.add_argument("--runs", type=int, metavar="N", help="end the sweep after so many runs")
    parser.add_argument("--out", default="sweep.yaml", metavar="FILE.yaml", help="the file (default: sweep.yaml)")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable, write_text
    from flowmap.plan.sweep import sweep_of

    path = Path(a.out)
    check_writable(path.parent, "--out")
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(MADE_BY.encode())):
        raise ValueError(f"--out: {path} is there and was not written by `flowmap sweep`; choose another file")
    options = dict(metric=a.metric, steps=a.steps, method=a.method, runs=a.runs, imports=a.imports or ())
    write_text(path, MADE_BY + sweep_of(a.recipe, a.overrides, **options).text)
    print(f"{path}\nwandb sweep {path}\nwandb agent <the id that it prints>")
    return 0
