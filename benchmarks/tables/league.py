"""The tables of league.py, from what `flowmap compare` found: medians over seeds, with least and most in brackets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from lib.report import spread


def tables(found: Mapping[str, Any], default: str) -> dict[str, dict]:
    """name -> {"columns": [...], "rows": [[...], ...]}, of the first metric, to held-out samples.

    `ratios` compares with the default within seeds. `train` is the same to training samples; `recall`, `precision`, and
    `classes`, the distance in the second feature space, are there if they are among the metrics.
    """
    metrics = found["metrics"]
    made = {
        "quality": quality(found, metrics[0]),
        "ratios": ratios(found, metrics[0], default),
        "best": best(found, metrics[0], default),
    }
    others = {
        "recall": next((metric for metric in metrics if metric.startswith("recall")), None),
        "precision": next((metric for metric in metrics if metric.startswith("precision")), None),
        "classes": next((m for m in metrics[1:] if m.startswith("frechet") and not m.endswith("_train")), None),
        "train": f"{metrics[0]}_train",
    }
    return made | {name: quality(found, one, costs=False) for name, one in others.items() if one in metrics}


def quality(found: Mapping[str, Any], metric: str, costs: bool = True) -> dict:
    """A row for each recipe, then the teacher at as many Euler steps and at its own, and real against real."""
    steps, rows = list(map(str, found["terms"]["steps"])), []
    for name, one in sorted(found["recipes"].items(), key=lambda item: _middle(item[1], "2", metric)):
        values = _by_steps(found, name, metric)
        cost = [_cost(one, key) for key in ("steps", "own_seconds", "peak_gib")] + [
            f"{one['diverged']} of {one['runs']}"
        ]
        rows.append([name, *(spread(values[k]) or _why(one) for k in steps), *(cost if costs else ())])
    blank = [""] * 4 if costs else []
    few = [_said(found["beside"].get(f"teacher, {k} Euler steps", {}).get(metric)) for k in steps]
    rows.append(["teacher, as many Euler steps", *few, *blank])
    for label, row in found["beside"].items():
        if label not in [f"teacher, {k} Euler steps" for k in steps] and metric in row:
            rows.append([label, *[_said(row[metric])] * len(steps), *blank])
    heads = ["optimiser steps", "own seconds", "peak GiB", "diverged"] if costs else []
    return {"columns": [metric, *(f"{k} step{'s' * (k != '1')}" for k in steps), *heads], "rows": rows}


def ratios(found: Mapping[str, Any], metric: str, default: str) -> dict:
    """A row for each recipe: its figure divided by the default's of the same seed, and in how many seeds it is less."""
    steps, rows = list(map(str, found["terms"]["steps"])), []
    for name, _ in sorted(found["recipes"].items(), key=lambda item: _middle(item[1], "2", metric)):
        if name != default:
            rows.append([name, *(_ratio(found, name, default, k, metric) for k in steps)])
    return {"columns": [f"{metric}, over {default}'s", *(f"{k} step{'s' * (k != '1')}" for k in steps)], "rows": rows}


def _ratio(found: Mapping[str, Any], name: str, default: str, k: str, metric: str) -> str:
    pairs = zip(_by_seed(found, name, k, metric), _by_seed(found, default, k, metric), strict=True)
    values = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return f"{spread(values)}; less in {sum(v < 1 for v in values)} of {len(values)}" if values else ""


def best(found: Mapping[str, Any], metric: str, default: str) -> dict:
    """At each number of steps: the recipe with the least median, of those that finished in every seed.

    With it, how far the default is behind, seed by seed: "within noise" if the sign differs between seeds.  Then
    every recipe that is ahead of the default in every seed, the best or not.
    """
    rows, seeds = [], found["terms"]["seeds"]
    for k in map(str, found["terms"]["steps"]):
        known = {name: values for name in found["recipes"] if None not in (values := _by_seed(found, name, k, metric))}
        if default not in known or not seeds:
            continue
        first = min(known, key=lambda name: statistics.median(known[name]))
        behind = [mine / other - 1 for mine, other in zip(known[default], known[first], strict=True)]
        within = "yes" if first == default or min(behind) <= 0 else "no" if seeds > 1 else "? (one seed)"
        said = "" if first == default else spread(100 * one for one in behind)
        ahead = [
            name for name in known if all(other < mine for mine, other in zip(known[default], known[name], strict=True))
        ]
        always = ", ".join(sorted(ahead, key=lambda name: statistics.median(known[name]))) if seeds > 1 else ""
        rows.append([int(k), first, spread(known[first]), spread(known[default]), said, within, always])
    columns = [
        "steps",
        "best",
        "its figure",
        f"{default}'s",
        f"{default} behind, %",
        "within noise",
        "ahead of it in every seed",
    ]
    return {"columns": columns, "rows": rows}


def _by_steps(found: Mapping[str, Any], name: str, metric: str) -> dict[str, list[float]]:
    whole = [result["figures"] for result in found["results"] if result["recipe"] == name]
    return {str(k): [row[str(k)][metric] for row in whole if str(k) in row] for k in found["terms"]["steps"]}


def _by_seed(found: Mapping[str, Any], name: str, k: str, metric: str) -> list[float | None]:
    by_seed = {result["seed"]: result["figures"] for result in found["results"] if result["recipe"] == name}
    return [by_seed.get(seed, {}).get(k, {}).get(metric) for seed in range(found["terms"]["seeds"])]


def _middle(one: Mapping[str, Any], k: str, metric: str) -> float:
    return one["figures"].get(k, {}).get(metric, {}).get("median", float("inf"))


def _why(one: Mapping[str, Any]) -> str:
    return "no time" if one["no_time"] else ""


def _cost(one: Mapping[str, Any], key: str) -> str:
    return f"{one['cost'][key]['median']:.3g}" if key in one["cost"] else ""


def _said(value: Mapping[str, float] | None) -> str:
    return (
        ""
        if value is None
        else spread([value["median"]] if value["count"] == 1 else [value["least"], value["median"], value["most"]])
    )
