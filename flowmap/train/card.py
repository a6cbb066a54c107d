"""The model card of a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmap.base.schema import kind_of
from flowmap.evaluation.tables import tabulated
from flowmap.export.metadata import front_matter, student_metadata, teacher_card
from flowmap.metrics import TRAIN
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.student.config import StudentConfig


def model_card(recipe: Recipe, config: StudentConfig, metrics: dict | None) -> str:
    """README.md of a student folder: what the student is, how to use it, and the figures that were measured."""
    steps = ", ".join(str(k) for k in recipe.sampler.steps)
    label = f'"{config.class_names[-1]}"' if config.class_names else min(3, (config.num_classes or 1) - 1)
    given = [f'"class": {label}'] if config.num_classes else []
    given += ['"prompt": "..."'] if config.text is not None else []
    cond = f"cond={{{', '.join(given)}}}" if given else ""
    guidance = f"guidance={config.guidance[2]}" if config.guidance else ""
    arguments = ", ".join(
        part for part in ("16", f"steps={recipe.sampler.steps[-1]}", cond, guidance, "seed=0") if part
    )
    card = teacher_card(recipe)
    lines = [
        *front_matter(student_metadata(recipe, config, metrics)),
        "",
        f"# {recipe.name}",
        "",
        f"A flowmap student: samples of shape {tuple(config.shape)} in {steps} steps. "
        f"Objective: {kind_of(recipe.objective, TABLES)}; "
        f"teacher: {recipe.teacher.name if recipe.teacher else 'none'}; trained for {config.step} steps.",
        "",
        "```python",
        "import flowmap",
        'student = flowmap.load_student("path/to/this/folder")',
        f"samples = student.sample({arguments})",
        "```",
        "",
        *((config.classes_listed(), "") if config.class_names else ()),
        "`recipe.yaml` is the whole recipe. Weights are averaged (EMA) and stored as safetensors.",
        *([f"Licence of the teacher: {card.licence}."] if card else ()),
        "",
        "## Figures",
        "",
    ]
    if config.lora is not None:
        lines.insert(
            -3,
            f"They are LoRA adapters of rank {config.lora.rank} and branches; "
            f"the frozen network beside them is {config.base}.",
        )
    if config.prior is not None:
        lines.insert(-3, f"Samples start at {config.prior}; it lies in `prior/`.")
    return "\n".join(lines + figures_table(metrics) + throughput(recipe, metrics)) + "\n"


def throughput(recipe: Recipe, metrics: Mapping[str, Any] | None) -> list[str]:
    """A line with the samples drawn a second while the figures were measured; nothing where that was not timed."""
    seconds = metrics.get("seconds", {}) if metrics else {}
    num = max((spec.num_starts for spec in recipe.metrics), default=0)
    times = {k: seconds.get(f"student_{k}", 0.0) for k in (metrics or {}).get("student", {})}
    found = [f"{num / taken:,.4g} in {k} step{'s' * (k != '1')}" for k, taken in times.items() if num and taken]
    where = "decoding included, on the machine that measured the figures"
    return ["", f"Samples a second: {', '.join(found)} ({where})."] if found else []


LABELS = {
    "student": "student, {steps} step{s}",
    "teacher": "teacher, {steps} steps ({nfe} network calls)",
    "floor": "real against real (floor)",
    "spread": "floor, standard deviation",
}


def figures_table(metrics: Mapping[str, Any] | None) -> list[str]:
    """metrics.json as lines of Markdown."""
    if not metrics:
        return ["Not measured yet."]
    names, rows = tabulated(metrics, LABELS)
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    if any(name.endswith(TRAIN) for name in names):
        table += ["", f"Distances are to held-out samples; those that end in `{TRAIN}` are to training samples."]
    return [*table, "", f"Note: {metrics['data']}."] if "data" in metrics else table


def short_card(title: str, what: str, metrics: Mapping[str, Any] | None) -> str:
    """A short model card: a title, a sentence, the figures."""
    return "\n".join([f"# {title}", "", what, "", "## Figures", "", *figures_table(metrics), ""])
