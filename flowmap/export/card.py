"""The model card of an exported folder: how to load it, its origin, its licence and its figures.

It starts with the metadata that a hub reads: licence, base model, library, tags.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from flowmap.data import TeacherSlot
from flowmap.export.plan import Export, Written
from flowmap.plan.cards import card_of
from flowmap.recipe.recipe import read_resolved
from flowmap.teachers.card import Card

WHAT = {
    "stock": "a stock diffusers pipeline: no code of its own",
    "custom": (
        "a diffusers pipeline with its own code in this folder "
        "(`pipeline.py` and `flow_map/*.py`: read it before you trust it)"
    ),
    "lora": "a diffusers LoRA, for the stock pipeline of its base model",
    "torch": "one torch program, `program.pt2`: noise and conditions in, samples out",
}


FOLDED = {"stock": "folded into the weights", "lora": "folded into the adapter", "torch": "unrolled"}
LICENCES = {
    "apache-2.0": r"Apache[- ]2(\.0)?",
    "mit": "MIT",
    "cc-by-nc-sa-4.0": r"CC[- ]BY-NC-SA[- ]4\.0",
    "cc-by-nc-4.0": r"CC[- ]BY-NC[- ]4\.0",
    "cc-by-sa-4.0": r"CC[- ]BY-SA[- ]4\.0",
    "cc-by-4.0": r"CC[- ]BY[- ]4\.0",
    "creativeml-openrail-m": "CreativeML Open ?RAIL-?M",
    "openrail++": r"(CreativeML )?Open ?RAIL\+\+(-M)?",
}
"""A hub's name of a licence, and the pattern of its name in our cards."""


def export_card(plan: Export, kind: str, written: Written) -> str:
    """The text of the folder's README.md. kind: stock, custom, lora or torch."""
    config = plan.student.config
    scale = "" if plan.guidance is None or kind == "torch" else f", guidance scale {plan.guidance:g}"
    fixed = FOLDED.get(kind, "the defaults; any other can be asked for")
    name, card = _teacher(plan)
    lines = [
        *_front(plan, kind, card), "",
        f"# {config.recipe}", "",
        f"A flowmap student, exported as {WHAT[kind]}. {plan.steps} step{'s' * (plan.steps > 1)}{scale}: {fixed}. "
        f"Samples of shape {tuple(config.shape)}.", "", *((config.classes_listed(), "") if config.class_names else ()),
        "```python", written.snippet, "```", "",
        *(line for note in written.notes for line in (note, "")),
        "## Origin", "", f"- recipe: {config.recipe} ({config.recipe_hash or 'no hash'}), {config.step} training steps",
        f"- teacher: {name}{_origin(card)}", f"- licence of the teacher: {card.licence if card else '?'}", "",
        "## Figures", "", _figures(plan),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _front(plan: Export, kind: str, card: Card | None) -> list[str]:
    """The metadata block that a hub reads, without entries that are unknown."""
    lora, base = plan.student.config.lora is not None, _base_model(plan, card)
    lines = ["---", "library_name: " + ("pytorch" if kind == "torch" else "diffusers"), *_licence(card)]
    if base is not None:
        lines += [f"base_model: {base}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    if len(plan.student.config.shape) == 3:
        prompts = plan.student.config.text is not None
        lines.append(f"pipeline_tag: {'text-to-image' if prompts else 'unconditional-image-generation'}")
    return [*lines, f"tags: [flowmap, few-step{', lora' * lora}]", "---"]


def _licence(card: Card | None) -> list[str]:
    """The licence by its short name on hubs, or "other" with its own name."""
    if card is None or card.licence == "?":
        return []
    for short, pattern in LICENCES.items():
        if re.match(rf"{pattern}(?![\w.+-])", card.licence, re.IGNORECASE):
            return [f"license: {short}"]
    return ["license: other", f"license_name: {json.dumps(card.licence)}"]


def _base_model(plan: Export, card: Card | None) -> str | None:
    """The hub id of the network that the student started from; None if it is not on a hub."""
    base = plan.student.config.base
    source = base.source if base else card.source if card and card.kind == "diffusers" else None
    return source if source and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).is_dir() else None


def _teacher(plan: Export) -> tuple[str, Card | None]:
    """The name of the teacher's card in the student's recipe, and the card if it is available."""
    folder = plan.student.folder
    try:
        recipe = read_resolved(folder / "recipe.yaml") if folder and (folder / "recipe.yaml").is_file() else None
        if recipe is None or recipe.teacher is None:
            return ("?" if recipe is None else "none"), None
        return recipe.teacher.name, _card(recipe.teacher)
    except ValueError:
        return "?", None


def _card(slot: TeacherSlot) -> Card | None:
    try:
        return card_of(slot)
    except ValueError:
        return None


def _origin(card: Card | None) -> str:
    if card is None:
        return ""
    revision = f" at {card.revision}" if card.revision else ""
    return f" ({card.describe()}{revision})" + (f", {card.reference}" if card.reference else "")


def _figures(plan: Export) -> str:
    """The figures in the student's own card, which were measured before the export."""
    folder = plan.student.folder
    path = folder / "README.md" if folder else None
    text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
    figures = text.partition("## Figures")[2].strip()
    return figures or "Not measured yet."
