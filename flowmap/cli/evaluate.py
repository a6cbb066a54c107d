"""`flowmap evaluate`: measures a student by its recipe's metrics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowmap.cli import coco
from flowmap.cli.arguments import check_figures, given_student, guided_arguments
from flowmap.cli.terminal import log, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    guided_arguments(parser)
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="default: the recipe's")
    parser.add_argument("--metrics", nargs="+", metavar="KIND", help="only these kinds")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--no-teacher", dest="teacher", action="store_false", help="leave the teacher's rows out")
    parser.add_argument(
        "--anew",
        action="store_true",
        help="measure the teacher and the floor again, not as they are in the run's metrics.json",
    )
    coco.add_arguments(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.evaluation.measure import evaluate

    if a.protocol is not None:
        return coco.run(a)
    coco.refuse(a)
    if a.out is not None:
        check_writable(Path(a.out).parent, "--out")
        check_figures(Path(a.out))
    student = given_student(a)
    options: dict[str, Any] = dict(metrics=a.metrics, guidance=a.guidance, teacher=a.teacher, anew=a.anew)
    metrics = evaluate(student, a.steps, out=a.out, progress=log, **options)
    print(summary(metrics) if a.out else json.dumps(metrics, indent=2))
    return 0
