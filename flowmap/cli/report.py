"""`flowmap report`: writes one HTML file, or a report in W&B, about runs."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import device_of, import_argument
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It needs matplotlib (the extra `bench`). Runs that are not finished are reported as such."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    what = "html, one file, or wandb, a report in W&B (extra `panels`, and a login; default: html)"
    parser.add_argument("--to", choices=["html", "wandb"], default="html", help=what)
    parser.add_argument("--out", metavar="FILE.html", help="the file (default: report.html)")
    what = "load no student and no teacher: no trajectories, and only samples that the runs have drawn"
    parser.add_argument("--no-draw", action="store_true", help=what)
    parser.add_argument(
        "--device", help="where trajectories are drawn (default: a GPU, if there is one, otherwise cpu)"
    )
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    if a.to == "wandb":
        from flowmap.compare.wandb_report import write_wandb_report

        if a.out is not None:
            raise ValueError("--out: is the file of --to html; a report in W&B has an address")
        if a.no_draw or a.device is not None:
            given = "--no-draw" if a.no_draw else "--device"
            raise ValueError(f"{given}: goes with --to html; a report in W&B has what the runs have drawn")
        print(write_wandb_report(a.runs))
        return 0
    from flowmap.compare.run_report import write_run_report

    device = "cpu" if a.no_draw else device_of(a.device)
    print(write_run_report(a.runs, a.out or "report.html", draw=not a.no_draw, device=device, log=log))
    return 0
