"""The tables of language.py: medians over seeds, with least and most in brackets where there are several."""

from __future__ import annotations

from collections.abc import Sequence

from lib.report import spread

Rows = dict  # of one seed: part -> {row: {figure: value, "first": the first ten sentences, seed 0 alone}}
FEW = {
    "calls": "calls", "seconds": "seconds", "perplexity": "perplexity", "divergence_words": "divergence, words",
    "divergence_minilm": "MiniLM",
    "divergence_words_train": "to training: words", "divergence_minilm_train": "to training: MiniLM",
    "length_within": "length", "part_of_speech_hit": "part of speech", "phrase_hit": "phrase",
    "category_hit": "category",
    "distinct_2": "distinct-2", "self_bleu": "self-BLEU", "copied": "copied", "nearest": "nearest",
}  # fmt: skip
EDIT = {
    "calls": "calls", "style_hit": "target hit", "phrase_hit": "phrase", "kept_bleu": "BLEU kept",
    "kept_rouge_l": "ROUGE-L kept",
    "kept_minilm": "MiniLM kept", "unchanged": "unchanged", "distinct_2": "distinct-2",
}  # fmt: skip
CONTROL = {
    "calls": "calls", "length_within": "length", "part_of_speech_hit": "part of speech", "phrase_hit": "phrase",
    "category_hit": "category",
    "perplexity": "perplexity", "distinct_2": "distinct-2",
}  # fmt: skip
INFILL = {
    "calls": "calls", "infilled_bleu": "BLEU", "infilled_rouge_l": "ROUGE-L", "infilled_exactly": "exactly",
    "perplexity": "perplexity of the whole",
    "distinct_2": "distinct-2",
}  # fmt: skip
LOSSES = {"loss": "loss", "loss_of_another": "loss, conditions of another"}
TOKENS = INFILL | LOSSES
TAGS = {
    "calls": "calls", "tag_hit": "tags", "tags_exactly": "all tags", "tag_chance": "tags of another",
    "perplexity": "perplexity", "distinct_2": "distinct-2",
} | LOSSES  # fmt: skip
COLUMNS = {"few": FEW, "edit": EDIT, "control": CONTROL, "infill": INFILL, "tokens": TOKENS, "tags": TAGS}
TOKEN_TABLES = ("tokens", "filled", "tags", "tagged")  # in a file of their own
SHOWN = (
    "flow 20",
    "ayf 4",
    "ayf 1",
    "reflow 1",
    "diffusion 1000",
    "prior of the VAE",
)  # rows whose sentences are shown


def tables(seeds: Sequence[Rows]) -> dict[str, dict]:
    """Every table with figures: name -> {"columns": [...], "rows": [[...], ...]}.

    The diffusion is among the few-step rows.
    """
    parts = {"few": ("few", "diffusion"), "edit": ("edit",), "control": ("control",), "infill": ("infill",)}
    parts |= {"tokens": ("infill_tokens",), "tags": ("tags",)}
    made = {}
    for name, of in parts.items():
        rows = [{key: row for one in of for key, row in seed.get(one, {}).items()} for seed in seeds]
        made[name] = part(rows, COLUMNS[name])
    made["samples"] = side_by_side({**seeds[0].get("few", {}), **seeds[0].get("diffusion", {})}, SHOWN)
    made["edited"] = edited(seeds[0].get("edit", {}))
    made["infilled"] = side_by_side(seeds[0].get("infill", {}), ("what stood there", "flow 4", "flow 20"))
    filled = ("what stood there", "vectors 4", "tokens 4", "tokens 20")
    made["filled"] = side_by_side(seeds[0].get("infill_tokens", {}), filled)
    tagged = ("held-out sentences", "tags 4", "tags 20", "no condition 20")
    made["tagged"] = side_by_side(seeds[0].get("tags", {}), tagged)
    return {name: one for name, one in made.items() if one["rows"]}


def part(seeds: Sequence[dict], columns: dict[str, str]) -> dict:
    """A row for each arm that any seed has, of the columns that any row has."""
    names = list(dict.fromkeys(key for seed in seeds for key in seed))
    have = [column for column in columns if any(column in row for seed in seeds for row in seed.values())]
    rows = [
        [name, *(spread(seed[name][column] for seed in seeds if column in seed.get(name, {})) for column in have)]
        for name in names
    ]
    return {"columns": ["", *(columns[column] for column in have)], "rows": rows}


def side_by_side(rows: dict, names: Sequence[str]) -> dict:
    """The first ten sentences of seed 0 in those rows; every row was asked for the same."""
    shown = [name for name in names if "first" in rows.get(name, {})]
    return {
        "columns": shown,
        "rows": [list(line) for line in zip(*(map(_plain, rows[name]["first"]) for name in shown), strict=True)],
    }


def edited(rows: dict) -> dict:
    """The first ten edits of seed 0: category, beside the mean difference."""
    shown = [
        name
        for name in ("category: flow 8", "category: reflow 1", "category: mean difference x 2")
        if "first" in rows.get(name, {})
    ]
    if not shown:
        return {"columns": [], "rows": []}
    sources = [_plain(source) for source, _ in rows[shown[0]]["first"]]
    lines = [
        list(line)
        for line in zip(sources, *([_plain(text) for _, text in rows[name]["first"]] for name in shown), strict=True)
    ]
    return {"columns": ["from", *(name.removeprefix("category: ") for name in shown)], "rows": lines}


def _plain(text: str) -> str:
    return text.replace("|", "/") or "(empty)"
