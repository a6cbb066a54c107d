"""The tables of adversarial.py: medians over seeds, with least and most in brackets where there are several."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from lib.report import spread

# of one seed: {"student": {arm: {steps: {metric: value}}}, "floor": {metric: value}, "cost": {arm: ...},
# "seconds a step": {arm: s}}
Found = dict
NAMES = {
    "before": "before",
    "control": "trained on, without a discriminator",
    "after": "trained on, with a discriminator",
}
PAIRS = (("after", "before"), ("control", "before"), ("after", "control"))


def tables(runs: Sequence[Found]) -> dict[str, dict]:
    """name -> {"columns": [...], "rows": [[...], ...]}, for all that the runs have figures for."""
    looked = [run for run in runs if "student" in run]
    made = {"few": few(looked), "train": few(looked, trained=True), "ratios": ratios(looked)} if looked else {}
    made = {name: one for name, one in made.items() if len(one["columns"]) > 2}
    return made | {"cost": cost(runs)}


def few(runs: Sequence[Found], trained: bool = False) -> dict:
    """Every figure of every arm at each number of steps: to held-out samples, or trained: to those of training."""
    one = runs[0]["student"]["before"]
    metrics, rows = [metric for metric in next(iter(one.values())) if metric.endswith("_train") == trained], []
    for k in one:
        for arm, name in NAMES.items():
            cells = [spread([run["student"][arm][k][metric] for run in runs]) for metric in metrics]
            rows.append([k, name, *cells])
    rows.append(
        [
            "",
            "floor: real against real",
            *(spread([run["floor"].get(metric, 0.0) for run in runs][:1]) for metric in metrics),
        ]
    )
    return {"columns": ["steps", "", *metrics], "rows": rows}


def ratios(runs: Sequence[Found]) -> dict:
    """Comparisons within one seed: distances as ratios, shares (precision and recall) as differences.

    Also the number of seeds in which the first is better.
    """
    rows = []
    for k, row in runs[0]["student"]["before"].items():
        for metric in [metric for metric in row if not metric.endswith("_train")]:
            cells = [_compared(runs, arms, k, metric) for arms in PAIRS]
            rows.append([k, metric, *(cell for pair in cells for cell in pair)])
    columns = [word for first, second in PAIRS for word in (f"{first} against {second}", "better in")]
    return {"columns": ["steps", "", *columns], "rows": rows}


def _compared(runs: Sequence[Found], arms: tuple[str, str], k: str, metric: str) -> tuple[str, str]:
    pairs = [tuple(run["student"][arm][k][metric] for arm in arms) for run in runs]
    if is_share(metric):
        better, values = sum(first > second for first, second in pairs), [first - second for first, second in pairs]
        middle = f"{statistics.median(values):+.3f}"
        ends = f" ({min(values):+.3f} to {max(values):+.3f})" if len(values) > 1 else ""
        return middle + ends, f"{better} of {len(runs)}"
    better = sum(first < second for first, second in pairs)
    return f"times {spread([first / second for first, second in pairs])}", f"{better} of {len(runs)}"


def is_share(metric: str) -> bool:
    """More of it is better."""
    return metric.startswith(("precision", "recall"))


def cost(runs: Sequence[Found]) -> dict:
    """CPU seconds of a step and of the whole run, imports included, and the most memory that its process held."""
    reads: dict[str, Callable[[Found, str], float]] = {
        "CPU seconds a step": lambda run, arm: run["seconds a step"][arm],
        "CPU seconds in all": lambda run, arm: run["cost"][arm]["cpu_seconds"],
        "peak GiB": lambda run, arm: run["cost"][arm]["peak_gib"],
    }
    rows = []
    for arm in ("control", "after"):
        rows.append([NAMES[arm], *(spread(_known(runs, arm, read)) for read in reads.values())])
    return {"columns": ["", *reads], "rows": rows}


def _known(runs: Sequence[Found], arm: str, read: Callable[[Found, str], float]) -> list[float]:
    values = []
    for run in runs:
        try:
            values.append(read(run, arm))
        except KeyError:  # not measured in this seed
            continue
    return values
