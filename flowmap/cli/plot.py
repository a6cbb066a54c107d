"""`flowmap plot`: draws the loss, the residual norm and a metric of runs, side by side."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import import_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It needs matplotlib (the extra `bench`). Runs that are not finished are drawn without metrics."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="metrics by their names in metrics.json (default: the first)",
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.compare.curves import plot_runs

    print(plot_runs(a.runs, a.out, metrics=a.metrics))
    return 0
