"""The metadata at the top of a model card, which hubs read: licence, base model, data sets, papers, figures.

What is not known is left out. Format: YAML between two lines "---", the keys of a hub's model cards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flowmap.base.hub import is_repository
from flowmap.base.schema import kind_of
from flowmap.plan.cards import card_of
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.papers import papers_of
from flowmap.recipe.recipe import Recipe
from flowmap.student.config import StudentConfig
from flowmap.teachers.card import Card

HUB_NAMES = {"fashion": "zalando-datasets/fashion_mnist"}  # data sets that we do not read from a hub
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


def front_matter(about: Mapping[str, Any]) -> list[str]:
    """The lines of the metadata."""
    text = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=None)
    return ["---", *text.rstrip().split("\n"), "---"]


def read_front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; empty without it, or if it cannot be read."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.S)
    try:
        about = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        about = None
    return about if isinstance(about, dict) else {}


def student_metadata(recipe: Recipe, config: StudentConfig, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metadata of a student's own folder."""
    card = teacher_card(recipe)
    task = task_of(config)
    return {
        "library_name": "flowmap",
        **licence(card),
        **base_model(config, card),
        **({"pipeline_tag": task} if task else {}),
        **({"datasets": found} if (found := datasets(recipe)) else {}),
        "tags": ["flowmap", "few-step", *(["lora"] if config.lora is not None else []), *papers(recipe, card)],
        **model_index(recipe, task or "other", metrics),
    }


def teacher_card(recipe: Recipe) -> Card | None:
    """The card of the recipe's teacher; None if there is none, or it is not on this machine."""
    try:
        return None if recipe.teacher is None else card_of(recipe.teacher)
    except ValueError:
        return None


def licence(card: Card | None) -> dict[str, str]:
    """The teacher's licence by its short name on hubs, or "other" with its own name."""
    if card is None or card.licence == "?":
        return {}
    for short, pattern in LICENCES.items():
        if re.match(rf"{pattern}(?![\w.+-])", card.licence, re.IGNORECASE):
            return {"license": short}
    return {"license": "other", "license_name": card.licence}


def base_model(config: StudentConfig, card: Card | None) -> dict[str, str]:
    """The hub id of the network that the student started from, if it is on a hub."""
    source = config.base.source if config.base else card.source if card and card.kind == "diffusers" else None
    if not source or not is_repository(source) or Path(source).is_dir():
        return {}
    return {"base_model": source, "base_model_relation": "finetune" if config.lora is None else "adapter"}


def task_of(config: StudentConfig) -> str | None:
    """A hub's name of what the student does; None for points and sentences."""
    if len(config.shape) != 3:
        return None
    return "unconditional-image-generation" if config.text is None else "text-to-image"


def datasets(recipe: Recipe) -> list[str]:
    """The hub ids of the recipe's data."""
    path, name = getattr(_source(recipe), "path", None), HUB_NAMES.get(kind_of(recipe.data, TABLES) or "")
    read = path if isinstance(path, str) and is_repository(path) and not Path(path).exists() else None
    return [one for one in (read, name) if one is not None]


def papers(recipe: Recipe, card: Card | None) -> list[str]:
    """Tags arxiv:NUMBER for the papers of the objective and of the teacher."""
    numbers = papers_of(kind_of(recipe.objective, TABLES) or "")
    numbers += re.findall(r"arXiv:(\d{4}\.\d{4,5})", card.reference) if card else []
    return [f"arxiv:{number}" for number in dict.fromkeys(numbers)]


def model_index(recipe: Recipe, task: str, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The student's figures in metrics.json in a hub's form: one entry for each metric and number of steps."""
    figures = [
        {"type": name, "name": f"{name}, {steps} step{'s' * (steps != '1')}", "value": value}
        for steps, row in (metrics or {}).get("student", {}).items()
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if not figures:
        return {}
    kind = kind_of(recipe.data, TABLES) or "data"
    data = {"name": kind, "type": next(iter(datasets(recipe)), kind)}
    return {
        "model-index": [
            {"name": recipe.name, "results": [{"task": {"type": task}, "dataset": data, "metrics": figures}]}
        ]
    }


def _source(recipe: Recipe) -> Any:
    """What samples are read from: `data.images` or `data.sentences` where there is one, otherwise `data`."""
    data = recipe.data
    return next((one for key in ("images", "sentences") if (one := getattr(data, key, None)) is not None), data)
