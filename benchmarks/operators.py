"""Is a tangent right, or refused by name, through every operator of torch?

Each operator is tried in every form of call, of dual inputs and of values, in float64.
tests/flow/operators.py defines a form, and when a tangent is right.  Forms whose tangent is wrong are printed.
`python benchmarks/operators.py [--samples 1] [--jobs 2]`, three minutes on two free cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import torch
from lib.report import environment, table, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where tests/ is
from tests.flow import operators  # noqa: E402

COLUMNS = ["called", "operators", "forms", "right", "proved constant", "refused", "wrong"]


def survey(which: tuple[int, int]) -> list:
    """The forms of one of torch's operators, by its place in torch's list."""
    torch.set_num_threads(1)
    place, samples = which
    return operators.survey(operators.operators()[place : place + 1], samples)[0]


def row(name: str, found: list) -> list:
    """One line of the table; a form that fails with another error than a refusal counts as wrong."""
    counts = Counter(outcome for _, outcome, _ in found)
    wrong = counts["wrong"] + counts["failed"]
    return [
        name,
        len({form.operator for form, *_ in found}),
        len(found),
        counts["right"],
        counts["constant"],
        counts["refused"],
        wrong,
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    found = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        places = [(i, arguments.samples) for i in range(len(operators.operators()))]
        for forms in pool.imap_unordered(survey, places):
            found += forms
            for form, outcome, message in forms:
                if outcome in ("wrong", "failed"):
                    print(outcome, *form, message[:200], flush=True)
    ways = dict.fromkeys(form.way for form, *_ in found)
    rows = [row(way, [one for one in found if one[0].way == way]) for way in ways] + [row("in all", found)]
    print(table(rows, COLUMNS))
    refused = sorted({form.operator for form, outcome, _ in found if outcome == "refused" and form.way == "as sampled"})
    print("refused as sampled, in some form:", ", ".join(refused))
    settings = {"samples": arguments.samples}
    payload = {"environment": environment(), "settings": settings, "columns": COLUMNS, "rows": rows, "refused": refused}
    write("operators", {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    main()
