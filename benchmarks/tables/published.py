"""The tables of published.py: medians over seeds, with least and most in brackets where they differ."""

from __future__ import annotations

from collections.abc import Mapping

from lib.report import spread

# {row: {seed: figures}}; figures of "real" are {metric: value}, of "teacher" {"euler 4": {metric: value}, ...}, of a
# method {"1": {metric: value}, ..., "train_steps": n, "train_cpu_seconds": ...}, the last not of a resumed training
Found = Mapping[str, Mapping[str, dict]]
SHOWN = {
    "frechet_pixels": "Frechet, pixels",
    "frechet_classifier": "Frechet, classifier",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "nearest": "nearest",
    "seconds_a_picture": "ms a picture",
}
METHODS = {
    "ayf_emd": "ayf_emd",
    "by_output": "ayf_emd, weight t",
    "by_output_longer": "ayf_emd, weight t, 5,500 training steps",
    "adversarial": "ayf_emd, then adversarial",
    "ayf_mixed": "ayf_mixed",
    "more_jumps": "ayf_mixed, 0.4 at (1, 0)",
    "ayf_lmd": "ayf_lmd",
    "unweighted": "ayf_lmd, no weight, from t = 0.95, rate 1e-4",
    "weighted": "ayf_lmd, weight 1 - t, 1,200 training steps",
    "weighted_rate": "ayf_lmd, weight 1 - t, rate 1e-3",
    "meanflow": "MeanFlow from the teacher",
    "reflow": "reflow",
    "instaflow": "reflow + distil",
}
NAMES = {"mnist-flow-vit": "flow", "mnist-flow-vit-unguided": "unguided", "mnist-ddpm": "ddpm"}


def tables(everything: Mapping) -> dict[str, dict]:
    """name -> {"columns": [...], "rows": [[...], ...]} for all that has figures."""
    made = {}
    for model, name in NAMES.items():
        if "teacher" in everything.get(model, {}):
            made[name] = figures(everything[model])
            made[f"{name}targets"] = targets(everything[model], "ddim 50" if name == "ddpm" else "euler 12")
    if packaged := everything.get("packaged-mnist-flow-vit"):
        made["packaged"] = packaged_table(packaged)
    if "flow" in made:
        made["short"] = short(made["flow"])
    return {name: table for name, table in made.items() if table["rows"]}


def figures(found: Found) -> dict:
    """Every row's figures."""
    asked = [key for key in SHOWN if any(key in row for row in found["teacher"]["0"].values())]
    cells = lambda rows: [spread(_shown(key, row[key]) for row in rows if key in row) for key in asked]
    lines = [["real pictures", "", *cells(list(found["real"].values())), ""]] if "real" in found else []
    for step in found["teacher"]["0"]:
        rows = [figures[step] for figures in found["teacher"].values() if step in figures]
        lines.append([f"teacher, {step}", str(len(rows)), *cells(rows), ""])
    for method, name in METHODS.items():
        seeds = list(found.get(method, {}).values())
        for k in [key for key in seeds[0] if key.isdigit()] if seeds else []:
            rows = [figures[k] for figures in seeds]
            cost = spread(one["train_cpu_seconds"] for one in seeds if "train_cpu_seconds" in one)
            lines.append([f"{name}, {k} step{'s' * (k != '1')}", str(len(rows)), *cells(rows), cost])
    columns = ["row", "seeds", *(SHOWN[key] for key in asked), "CPU-seconds to train"]
    return {"columns": columns, "rows": lines}


def targets(found: Found, many: str) -> dict:
    """Ratios of the student's Frechet distances to its teacher's from the same noise, or from that of seed 0.

    The teacher's best is that over all its numbers of steps. many: the row that one step is compared with.
    """
    lines = []
    for method, name in METHODS.items():
        for k in ("1", "2", "4", "8"):
            pairs = [
                (figures[k], found["teacher"].get(seed, found["teacher"]["0"]))
                for seed, figures in found.get(method, {}).items()
                if k in figures
            ]
            if pairs:
                lines.append([f"{name}, {k}", str(len(pairs)), *_compared(pairs, many)])
    accuracy = ["accuracy lost, points"] if _has(found, "accuracy") else []
    columns = ["student, steps", "seeds", "pixels: to its best", f"to {many}", "classifier: to its best", f"to {many}"]
    return {"columns": [*columns, *accuracy], "rows": lines}


def _compared(pairs: list[tuple[dict, dict]], many: str) -> list[str]:
    cells = []
    for metric in ("frechet_pixels", "frechet_classifier"):
        best = [student[metric] / min(row[metric] for row in teacher.values()) for student, teacher in pairs]
        cells += [spread(best), spread(student[metric] / teacher[many][metric] for student, teacher in pairs)]
    if all("accuracy" in student for student, _ in pairs):
        most = lambda teacher: min(teacher.values(), key=lambda row: row["frechet_pixels"])["accuracy"]
        cells.append(spread(100 * (most(teacher) - student["accuracy"]) for student, teacher in pairs))
    return cells


def packaged_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict:
    """Frechet distances in a packaged network's features, and their ratios to the teacher's at 50 steps."""
    lines = []
    for row, seeds in found.items():
        for k in next(iter(seeds.values())):
            steps = k if row == "teacher" else f"{k} step{'s' * (k != '1')}"
            name = "real pictures" if row == "real" else f"{METHODS.get(row, row)}, {steps}"
            rows = {seed: figures[k] for seed, figures in seeds.items() if k in figures}
            to = [] if row == "real" else [value / found["teacher"][s]["euler 50"] for s, value in rows.items()]
            lines.append([name, str(len(rows)), spread(rows.values()), spread(to)])
    return {"columns": ["row", "seeds", "Frechet, EfficientNet-Lite0", "to the teacher's at 50 steps"], "rows": lines}


def short(table: dict) -> dict:
    """The rows of README.md: real pictures, the teacher's best, and ayf_emd at 1, 2 and 4 steps."""
    by_name = {row[0]: row for row in table["rows"]}
    taught = [row for name, row in by_name.items() if name.startswith("teacher")]
    best = min(taught, key=lambda row: float(row[2].split()[0]))
    wanted = [
        by_name.get("real pictures"),
        best,
        *(row for name, row in by_name.items() if name.startswith("ayf_emd")),
    ]
    return {"columns": ["row", "Frechet distance", "accuracy"], "rows": [[r[0], r[2], r[4]] for r in wanted[:5] if r]}


def _has(found: Found, key: str) -> bool:
    return any(key in row for row in found["teacher"]["0"].values())


def _shown(key: str, value: float) -> float:
    return 1000 * value if key == "seconds_a_picture" else value
