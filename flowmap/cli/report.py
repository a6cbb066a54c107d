"""`flowmap report`: writes one HTML file about runs."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import device_of, import_argument
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It needs matplotlib (the extra `bench`). Runs that are not finished are reported as such."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", default="report.html", metavar="FILE.html", help="the file (default: report.html)")
    what = "load no student and no teacher: no trajectories, and only samples that the runs have drawn"
    parser.add_argument("--no-draw", action="store_true", help=what)
    parser.add_argument(
        "--device", help="where trajectories are drawn (default: a GPU, if there is one, otherwise cpu)"
    )
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.compare.run_report import write_run_report

    device = "cpu" if a.no_draw else device_of(a.device)
    print(write_run_report(a.runs, a.out, draw=not a.no_draw, device=device, log=log))
    return 0
