"""The report of a comparison: medians and spreads over seeds, as compare.json, as Markdown, as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmap.base.files import write_json, write_text
from flowmap.base.images import save_picture
from flowmap.compare.plot import plot
from flowmap.compare.terms import Terms

Spread = Mapping[str, float]  # median, least, most, over `count` runs


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "count": len(values)}


def report(
    names: Sequence[str], results: Sequence[dict[str, Any]], besides: Sequence[dict[str, Any]], terms: Terms, seeds: int
) -> dict[str, Any]:
    """The contents of compare.json.

    `recipes` and `beside` (teacher, baseline) have the spread over seeds for each metric and number of steps.
    """
    steps = [str(k) for k in terms.steps]
    recipes = {name: _of_recipe([r for r in results if r["recipe"] == name], steps) for name in names}
    teacher_steps = next((b["teacher"]["steps"] for b in besides if "teacher" in b), None)
    rows = {
        f"teacher, {k} Euler steps": [b["teacher_few"][k] for b in besides if k in b.get("teacher_few", {})]
        for k in steps
    }
    rows[f"teacher, {teacher_steps} Euler steps"] = [b["teacher"] for b in besides if "teacher" in b]
    rows["real against real"] = [b["floor"] for b in besides]
    known = {"steps", "nfe"}
    return {
        "terms": {
            "seconds": terms.seconds,
            "evaluations": terms.evaluations,
            "steps": list(terms.steps),
            "seeds": seeds,
        },
        "metrics": list(dict.fromkeys(key for b in besides for key in b["floor"] if not key.endswith("_std"))),
        "recipes": recipes,
        "beside": {
            label: _spreads([{k: v for k, v in row.items() if k not in known} for row in found])
            for label, found in rows.items()
            if found
        },
        "results": list(results),
        **next(({"data": b["data"]} for b in besides if "data" in b), {}),
    }


def _of_recipe(results: list[dict[str, Any]], steps: list[str]) -> dict[str, Any]:
    ends = [result["ended"] for result in results]
    whole = [result for result in results if result["ended"] in ("whole", "cut")]
    keys = ("train_seconds", "steps", "images", "evaluations", "peak_gib", "own_seconds")
    share = [result["steps"] / result["planned_steps"] for result in whole]
    return {
        "figures": {k: _spreads([result["figures"][k] for result in whole if k in result["figures"]]) for k in steps},
        "cost": {key: spread([r[key] for r in whole if key in r]) for key in keys if any(key in r for r in whole)},
        "share_done": spread(share) if share else None,
        "runs": len(results),
        **{end.replace(" ", "_"): ends.count(end) for end in ("cut", "diverged", "no time")},
    }


def _spreads(rows: list[Mapping[str, float]]) -> dict[str, Spread]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: spread([row[name] for row in rows if name in row]) for name in names}


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write compare.json, table.md and quality.png."""
    write_json(folder / "compare.json", found)
    write_text(folder / "table.md", markdown(found))
    if found["metrics"]:
        save_picture(folder / "quality.png", plot(*lines_of(found, found["metrics"][0])))


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each metric, with the costs in the first one.

    A cell has the median (least to most) over the seeds that finished.
    """
    terms = found["terms"]
    given = (
        f"{terms['seconds']:g} seconds of training"
        if terms["seconds"]
        else f"{terms['evaluations']:g} network evaluations"
    )
    parts = [f"Each recipe and seed: {given}. {terms['seeds']} seeds; median (least to most) of those that finished."]
    for i, metric in enumerate(found["metrics"]):
        parts.append(f"{metric}\n\n{table(found, metric, costs=i == 0)}")
    return "\n\n".join([*parts, *note(found), ENDS]) + "\n"


def note(found: Mapping[str, Any]) -> list[str]:
    """What the figures say of data that are not real, in a line; none of real data."""
    return [f"Note: {found['data']}."] if "data" in found else []


ENDS = (
    "Steps: of the optimiser. Evaluations: network passes of one sample, a backward pass for two, the teacher's calls "
    "among them. Own: seconds of\nthe budget that went into what the recipe alone needs. GiB: the process's peak in "
    "training. Done: the least share of\nthe steps that a trial of its speed had foreseen, for which its schedules "
    "were made, before the clock ended the run."
)


def table(found: Mapping[str, Any], metric: str, *, costs: bool) -> str:
    steps = [str(k) for k in found["terms"]["steps"]]
    heads = ["", *(f"{k} step{'s' * (k != '1')}" for k in steps), *(COSTS if costs else ())]
    rows = []
    for name, one in found["recipes"].items():
        cells = [_cell(one["figures"][k].get(metric)) for k in steps]
        rows.append([name, *cells, *(_costs(one) if costs else ())])
    blank = [""] * (len(COSTS) if costs else 0)
    few = {k: found["beside"].get(f"teacher, {k} Euler steps", {}).get(metric) for k in steps}
    if any(few.values()):
        rows.append(["teacher, Euler", *(_cell(few[k]) for k in steps), *blank])
    for label, row in found["beside"].items():
        if label not in [f"teacher, {k} Euler steps" for k in steps] and metric in row:
            rows.append([label, *[_cell(row[metric])] * len(steps), *blank])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


COSTS = ("train seconds", "own", "steps", "evaluations", "GiB", "done", "diverged", "runs")


def _costs(one: Mapping[str, Any]) -> list[str]:
    cost = lambda key: f"{one['cost'][key]['median']:.4g}" if key in one["cost"] else ""
    kept = [cost(key) for key in ("train_seconds", "own_seconds", "steps", "evaluations", "peak_gib")]
    failed = f"{one['diverged']}" + (f" ({one['no_time']} no time)" if one["no_time"] else "")
    done = f"{one['share_done']['least']:.3g}" if one["share_done"] else ""
    return [*kept, done, failed, str(one["runs"])]


def _cell(value: Spread | None) -> str:
    if value is None:
        return ""
    if value["count"] == 1:
        return f"{value['median']:.3g}"
    return f"{value['median']:.3g} ({value['least']:.3g} to {value['most']:.3g})"


def lines_of(found: Mapping[str, Any], metric: str):
    """The title, the steps, a line for each recipe and for the teacher (None where a figure is missing), and levels."""
    steps = found["terms"]["steps"]
    lines = {name: [one["figures"][str(k)].get(metric) for k in steps] for name, one in found["recipes"].items()}
    labels = [f"teacher, {k} Euler steps" for k in steps]
    if any(label in found["beside"] for label in labels):
        lines["teacher, Euler"] = [found["beside"].get(label, {}).get(metric) for label in labels]
    levels = {
        label: row[metric]["median"] for label, row in found["beside"].items() if label not in labels and metric in row
    }
    return metric, steps, {name: line for name, line in lines.items() if any(line)}, levels
