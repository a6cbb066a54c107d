"""The tables of lediflow.py: medians over seeds, with least and most in brackets where there are several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lib.report import spread

# of one seed: arm -> {"curve": [{"solver", "steps", "calls", "flops", "seconds", "frechet"}], "transport": ...,
# "codes": ...}
Run = dict
MANY = 50  # Euler steps of the Gaussian whose distance is to be reached
PAIR = ("gaussian", "learned")
DISTANCES = ("frechet", "frechet_train")  # to held-out samples and to those of training
STUDENTS = ("student of gaussian", "student of learned")


def tables(runs: Sequence[Run]) -> dict[str, dict]:
    """Every table that there are figures for: name -> {"columns": [...], "rows": [[...], ...]}."""
    made = {"ablation": ablation(runs), "students": students(runs)}
    if all(arm in run for arm in PAIR for run in runs):
        made |= {"curve": curve(runs), "savings": saved(runs), "codes": codes(runs), "copies": copies(runs)}
    return {name: one for name, one in made.items() if one["rows"]}


def curve(runs: Sequence[Run]) -> dict:
    """Both priors by solver and steps: what a sample costs, and its distance."""
    columns = [
        "prior",
        "solver",
        "steps",
        "network calls",
        "MFLOP a sample",
        "ms a sample",
        "Frechet distance",
        "to training samples",
    ]
    rows = [
        [arm, point["solver"], point["steps"], point["calls"], point["flops"] / 1e6, *_cells(runs, arm, i)]
        for arm in PAIR for i, point in enumerate(runs[0][arm]["curve"])
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


def _cells(runs: Sequence[Run], arm: str, i: int) -> list:
    points = [run[arm]["curve"][i] for run in runs]
    return [
        1e3 * statistics.median(p["seconds"] for p in points),
        *(spread(p[key] for p in points) for key in DISTANCES),
    ]


def students(runs: Sequence[Run]) -> dict:
    """The few-step students, and their own teachers at as many Euler steps."""
    rows = []
    for arm in STUDENTS:
        if done := [run for run in runs if arm in run]:
            rows.append(
                [arm, *(spread(at(run[arm], "own", k)[key] for run in done) for key in DISTANCES for k in (1, 2, 4))]
            )
    for arm in PAIR if rows else ():
        if done := [run for run in runs if arm in run]:
            rows.append(
                [
                    f"{arm} flow itself",
                    *(spread(at(run[arm], "euler", k)[key] for run in done) for key in DISTANCES for k in (1, 2, 4)),
                ]
            )
    return {"columns": ["Frechet distance", "1 step", "2", "4", "to training samples: 1 step", "2", "4"], "rows": rows}


def ablation(runs: Sequence[Run]) -> dict:
    """Every flow, over the seeds that have it.

    Its distances by Euler's steps, transport cost, straightness, training cost.
    """
    columns = [
        "flow",
        "seeds",
        "1 Euler step",
        "2",
        "4",
        f"{MANY}",
        "transport cost",
        "straightness",
        "training seconds",
        "of the prior",
    ]
    rows = []
    for arm in dict.fromkeys(arm for run in runs for arm in run if arm not in STUDENTS):
        done = [run[arm] for run in runs if arm in run]
        distances = [spread(at(one, "euler", k)["frechet"] for one in done) for k in (1, 2, 4, MANY)]
        costs = [
            statistics.median(one[key] for one in done)
            for key in ("transport", "straightness", "train_seconds", "prior_seconds")
        ]
        rows.append([arm, len(done), *distances, *costs])
    return {"columns": columns, "rows": rows}


def codes(runs: Sequence[Run]) -> dict:
    """Where z is drawn, and the decoder without any flow."""
    of = lambda read: spread(read(run["learned"]) for run in runs)
    rows = [
        [name, *(of(lambda one, n=name, k=k: one["codes"][n][k]) for k in ("2", "8", str(MANY)))]
        for name in runs[0]["learned"]["codes"]
    ]
    rows.append(["no flow: the decoder's mean", of(lambda one: one["decoder"]["mean"]), "", ""])
    rows.append(["no flow: a draw of the prior", of(lambda one: one["decoder"]["start"]), "", ""])
    rows.append(["floor: real against real", of(lambda one: one["floor"]), "", ""])
    return {"columns": ["z from", "2 Euler steps", "8", str(MANY)], "rows": rows}


def copies(runs: Sequence[Run]) -> dict:
    """How far samples are from the nearest training sample."""
    of = lambda arm, key: spread(run[arm]["nearest"][key] for run in runs)
    rows = [
        [arm, *(of(arm, key) for key in ("generated", "held_out", "ratio"))]
        for arm in PAIR
        if all("nearest" in run[arm] for run in runs)
    ]
    return {
        "columns": ["to the nearest training sample", "generated", "held out", "ratio (below 1: copies)"],
        "rows": rows,
    }


def saved(runs: Sequence[Run]) -> dict:
    """The cost of the learned prior's cheapest sample that is as good as the Gaussian's of 50 Euler steps.

    It is given as a share of the Gaussian's cost.
    """
    each = [savings(run) for run in runs]
    rows = [[f"{cost}, share of {whole}", _shares([one[f"{cost} / {whole}"] for one in each])]
            for cost in ("flops", "seconds") for whole in ("50 steps", "cheapest")]  # fmt: skip
    rows.append(["the distance to reach", spread(one["target"] for one in each)])
    return {"columns": ["", "learned / Gaussian"], "rows": rows}


def _shares(values: Sequence[float | None]) -> str:
    reached = [value for value in values if value is not None]
    never = "" if len(reached) == len(values) else f"{len(values) - len(reached)} of {len(values)} seeds never"
    return ", ".join(part for part in (spread(reached), never) if part)


def savings(run: Run) -> dict:
    """How much cheaper the learned prior reaches the Gaussian's 50-step distance; None if it never does.

    Relative to those 50 steps, and to the cheapest Gaussian sample that comes within 5 % of it.
    """
    there = at(run["gaussian"], "euler", MANY)
    reached = [p for p in run["learned"]["curve"] if p["frechet"] <= there["frechet"]]
    near = [p for p in run["gaussian"]["curve"] if p["frechet"] <= 1.05 * there["frechet"]]
    found = {"target": there["frechet"]}
    for cost in ("flops", "seconds"):
        best = min((p[cost] for p in reached), default=None)
        found[f"{cost} / 50 steps"] = None if best is None else best / there[cost]
        found[f"{cost} / cheapest"] = None if best is None else best / min(p[cost] for p in near)
    return found


def at(arm: dict, solver: str, steps: int) -> dict:
    """The arm's point of the curve by that solver in that many steps."""
    return next(p for p in arm["curve"] if (p["solver"], p["steps"]) == (solver, steps))
