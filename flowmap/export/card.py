"""The model card of an exported folder: how to load it, its origin, its licence and its figures.

It starts with the metadata that a hub reads: licence, base model, library, tags.
"""

from __future__ import annotations

from flowmap.data import TeacherSlot
from flowmap.export.metadata import base_model, front_matter, licence, read_front_matter, task_of
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
    "lora-peft": "a PEFT LoRA, for the transformer of its base model",
    "lora-comfyui": "a LoRA for ComfyUI, with the layers of the base model's original checkpoint",
    "torch": "one torch program, `program.pt2`: noise and conditions in, samples out",
    "onnx": "one ONNX graph, `program.onnx`: noise and conditions in, samples out",
}


FOLDED = {
    "stock": "folded into the weights",
    "lora": "folded into the adapter",
    "lora-peft": "folded into the adapter",
    "lora-comfyui": "folded into the adapter",
    "torch": "unrolled",
    "onnx": "unrolled",
}
LIBRARIES = {"torch": "pytorch", "onnx": "onnx"}  # a hub's names of the programs' libraries; all others are diffusers


def export_card(plan: Export, kind: str, written: Written) -> str:
    """The text of the folder's README.md. kind: a key of WHAT."""
    config = plan.student.config
    scale = "" if plan.guidance is None or kind in LIBRARIES else f", guidance scale {plan.guidance:g}"
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
    """The metadata block that a hub reads, with the data sets, papers and figures of the student's own card."""
    config, own = plan.student.config, read_front_matter(_own_card(plan))
    task = task_of(config)
    tags = [tag for tag in own.get("tags", ()) if str(tag).startswith("arxiv:")]
    return front_matter({
        "library_name": LIBRARIES.get(kind, "diffusers"),
        **licence(card),
        **base_model(config, card),
        **({"pipeline_tag": task} if task else {}),
        **{key: own[key] for key in ("datasets", "model-index") if key in own},
        "tags": ["flowmap", "few-step", *["lora"] * (config.lora is not None), *tags],
    })  # fmt: skip


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


def _own_card(plan: Export) -> str:
    """The student's own card; empty without one."""
    path = plan.student.folder / "README.md" if plan.student.folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else ""


def _figures(plan: Export) -> str:
    """The figures in the student's own card, which were measured before the export."""
    figures = _own_card(plan).partition("## Figures")[2].strip()
    return figures or "Not measured yet."
