"""The model card of an exported folder: what it is, how it is loaded, where it comes from, under which licence, and what was measured."""

from __future__ import annotations

from flowmap.export.plan import Export
from flowmap.plan import find_card
from flowmap.recipe import read_resolved
from flowmap.teachers.card import Card

WHAT = {
    "stock": "a stock diffusers pipeline: no code of its own",
    "custom": "a diffusers pipeline with its own code in this folder (`pipeline.py` and `flow_map/*.py`: read it before you trust it)",
    "torch": "one torch program, `program.pt2`: noise and conditions in, samples out",
}


def export_card(plan: Export, kind: str, snippet: str) -> str:
    """README.md of the folder. kind: stock, custom or torch; snippet: the lines that load and call it."""
    config = plan.student.config
    scale = "" if plan.guidance is None or kind == "torch" else f", guidance scale {plan.guidance:g}"
    fixed = "folded into the weights" if kind == "stock" else "unrolled" if kind == "torch" else "the defaults; any other can be asked for"
    name, card = _teacher(plan)
    lines = [
        "---", "library_name: " + ("pytorch" if kind == "torch" else "diffusers"), "tags: [flowmap, few-step]", "---", "",
        f"# {config.recipe}", "",
        f"A flowmap student, exported as {WHAT[kind]}. {plan.steps} step{'s' * (plan.steps > 1)}{scale}: {fixed}. "
        f"Samples of shape {tuple(config.shape)}.", "",
        "```python", snippet, "```", "",
        *_hints(plan, kind),
        "## Origin", "", f"- recipe: {config.recipe} ({config.recipe_hash or 'no hash'}), {config.step} training steps",
        f"- teacher: {name}{_origin(card)}", f"- licence of the teacher: {card.licence if card else '?'}", "",
        "## Figures", "", _figures(plan),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _hints(plan: Export, kind: str) -> list[str]:
    if kind == "stock":
        return [
            f"Take num_inference_steps={plan.steps} and no other: the network is told steps of 1/{plan.steps}. Text encoders are not in this "
            "folder: give embeddings, or hand the teacher's text encoders and tokenizers to from_pretrained.", "",
        ]  # fmt: skip
    return []


def _teacher(plan: Export) -> tuple[str, Card | None]:
    """The name of the teacher's card in the recipe beside the student, and the card where it is known here."""
    folder = plan.student.folder
    try:
        recipe = read_resolved(folder / "recipe.yaml") if folder and (folder / "recipe.yaml").is_file() else None
        if recipe is None or recipe.teacher is None:
            return ("?" if recipe is None else "none"), None
        return recipe.teacher.card, _card(recipe.teacher.card)
    except ValueError:
        return "?", None


def _card(name: str) -> Card | None:
    try:
        return find_card(name)
    except ValueError:
        return None


def _origin(card: Card | None) -> str:
    if card is None:
        return ""
    revision = f" at {card.revision}" if card.revision else ""
    return f" ({card.describe()}{revision})" + (f", {card.reference}" if card.reference else "")


def _figures(plan: Export) -> str:
    """The figures of the student's own card; they were measured before the export."""
    folder = plan.student.folder
    path = folder / "README.md" if folder else None
    text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
    figures = text.partition("## Figures")[2].strip()
    return figures or "Not measured yet."
