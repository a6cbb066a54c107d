"""Write the figures of benchmarks/results/*.json into the pages.

They go between <!-- figures:NAME --> and <!-- /figures -->; nothing else is changed.
`python benchmarks/fill_docs.py`.  A block without results stays as it is.  No figure in a page is typed by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lib.report import RESULTS, _cell, table

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "main_job": "main_job_digits.json", "main_job_short": "main_job_digits.json",
    "steps_law": "steps_law.json", "step_cost": "step_cost.json", "step_cost_peers": "step_cost.json",
    "step_cost_families": "step_cost_families.json",
    "compiled_cost": "compiled_cost.json", "compiled_run": "compiled_run_digits.json",
    "compiled_run_fashion14": "compiled_run_fashion14.json",
    "host_cost": "host_cost.json", "sampling": "sampling.json", "exactness": "exactness.json",
    "attention": "attention.json", "roofline": "roofline.json",
    "operators": "operators.json", "house": "house.json",
    "step_parts": "step_parts.json", "step_parts_before": "step_parts_before.json",
    "parity_teachers": "parity.json", "parity_exports": "parity.json",
    "parity_formats": "parity.json", "parity_refused": "parity.json", "emoji": "emoji.json",
    "emoji_embedding": "emoji_embedding.json",
    "own_teacher": "own_teacher.json", "node": "node.json",
    **{f"time_embedding_{net}_{one}": f"time_embedding_{net}.json"
       for net in ("edm2", "transformer") for one in ("start", "trained")},
    **{f"loader_{one}": "loader.json" for one in ("shards", "recipes", "pictures")},
    **{f"loader_{one}": "loader_order.json" for one in ("order", "cold")},
    "loader_node": "loader_workers.json",
    **{f"rewards_{one}": "rewards.json" for one in ("symmetry", "classifier")},
    **{f"published_{one}": "published.json"
       for one in ("flow", "flowtargets", "unguided", "unguidedtargets", "ddpm", "ddpmtargets", "packaged", "short")},
    **{f"{name}_{one}": f"{name}.json" for name in ("rectified_digits", "rectified_fashion14", "rectified_emoji")
       for one in ("reflow", "train", "ratios", "rule", "ablation", "few", "loss", "instaflow", "speed")},
    **{f"language_{one}": "language.json"
       for one in ("few", "edit", "control", "infill", "samples", "edited", "infilled")},
    **{f"language_{one}": "language_tokens.json" for one in ("tokens", "filled", "tags", "tagged")},
    **{f"{name}_{one}": f"{name}.json"
       for name in ("league_digits", "league_digits_new", "league_fashion14", "league_fashion14_joint")
       for one in ("quality", "ratios", "train", "best", "recall", "precision", "classes")},
    "score_distillation_causes": "score_distillation.json",
    **{f"peers_{one}": "peers.json"
       for one in ("agreement", "timing", "quality", "ahead", "recall", "train")},
    **{f"quantised_{one}": "quantised.json" for one in ("digits", "emoji")},
    **{f"{name}_{one}": f"{name}.json" for name in ("adversarial", "adversarial_fashion14")
       for one in ("few", "train", "ratios", "cost")},
    # fashion14 with --share 0.35, emoji with --share 0.15
    **{f"lediflow_{name}_{one}": f"lediflow_{name}{share}.json"
       for name, share in (("digits", ""), ("fashion14", "_share"), ("emoji", "_share"))
       for one in ("curve", "savings", "students", "ablation", "codes", "copies")},
}  # fmt: skip
SHORT = {
    "main_job_short": ("student 1", "student 2", "student 4", "teacher 64", "floor")
}  # the rows of README.md's table
COLUMNS = {"main_job": ["row", "median", "least", "most", "median ratio to teacher 64"]}
BLOCK = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.S)


def results() -> dict[str, dict]:
    """The contents of those result files that are there, by block."""
    return {
        name: json.loads((RESULTS / file).read_text()) for name, file in FILES.items() if (RESULTS / file).is_file()
    }


def filled(text: str, found: dict[str, dict]) -> str:
    """The page with every block whose results are found written anew."""
    return BLOCK.sub(
        lambda m: m[1] + block(m[2], found[m[2]]) + m[3] if m[2] in found and table_of(m[2], found[m[2]]) else m[0],
        text,
    )


def table_of(name: str, result: dict) -> dict | None:
    """The table of that name, of a result that has several or one alone; None where it was not measured."""
    return result["tables"].get(name) or result["tables"].get(name.rpartition("_")[2]) if "tables" in result else result


def block(name: str, result: dict) -> str:
    """The table of that name, and where its figures come from."""
    made = table_of(name, result)
    rows, columns = made["rows"], made.get("columns") or COLUMNS.get(name)
    if name == "steps_law":
        rows, columns = by_steps(rows)
    if name in SHORT:
        rows, columns = short(rows, columns, SHORT[name])
    plot = f"![{name}](../images/{name}.png)\n\n" if (ROOT / "docs" / "images" / f"{name}.png").is_file() else ""
    return f"{table(rows, columns or [''] * len(rows[0]))}\n\n{plot}{origin(name, result)}\n"


def short(rows: list[list], columns: list[str], wanted: tuple[str, ...]) -> tuple[list[list], list[str]]:
    """The wanted rows of the first group, as [row, median, least, most]."""
    group = [row for row in rows if row[0] == rows[0][0] and row[1] in wanted]
    return [row[1:5] for row in group], columns[1:5]


def by_steps(rows: list[list]) -> tuple[list[list], list[str]]:
    """Rows [data, model, steps, median, least, most] as one row a model, with a column of medians for each step count.

    The floor (steps 0) is in every column.
    """
    steps = sorted({row[2] for row in rows if row[2]})
    median = {(data, model, k): value for data, model, k, value, *_ in rows}
    lines = []
    for data, model in dict.fromkeys((row[0], row[1]) for row in rows):
        cells = [median.get((data, model, k), median.get((data, model, 0))) for k in steps]
        lines.append([data, model, *cells])
    return lines, ["data", "model", *(f"{k} step{'s' * (k > 1)}" for k in steps)]


def origin(name: str, result: dict) -> str:
    """Where the figures come from: seeds and settings, machine, versions, commit."""
    parts, own = [f"`benchmarks/results/{FILES[name]}`"], table_of(name, result) or {}
    if runs := result.get("runs"):
        walls = sorted(run["wall_seconds"] for run in runs)
        peak = max(run["peak_gib"] for run in runs)
        parts.append(
            f"{len(runs)} seeds; wall time {walls[0]:.0f} to {walls[-1]:.0f} s each, teacher included; "
            f"peak memory {peak:.2f} GiB"
        )
    elif isinstance(seeds := result.get("seeds"), dict):
        parts.append(", ".join(f"{count} seeds on {what}" for what, count in seeds.items()))
    elif given := own.get("settings") or result.get("settings") or result.get("setting"):
        listed = lambda key, value: len(value) if key == "seeds" and isinstance(value, list) else _cell(value)
        parts.append(", ".join(f"{key} {listed(key, value)}" for key, value in given.items()))
    if here := own.get("environment") or result.get("environment"):  # a table may have been measured by itself
        where = here["cpu"] if here["device"] == "cpu" else here["device"]
        parts.append(
            f"{where}, {here['threads']} threads; torch {here['versions']['torch']}; "
            f"commit {(here['commit'] or '?')[:10]}"
        )
    return ". ".join(parts) + "."


def main() -> None:
    found = results()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = filled(old, found)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
