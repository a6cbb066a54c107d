"""How much do the shipped recipes repeat?  Files, lines of settings, distinct ones, and those in two files or more.

`python benchmarks/recipe_lines.py [FOLDER ...]`, each a folder of recipes, or COMMIT:FOLDER of this repository
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from lib.report import table

ROOT = Path(__file__).resolve().parent.parent


def texts(folder: str) -> list[str]:
    """The texts of the YAML files below a folder, or below the folder as that commit had it."""
    if ":" not in folder:
        return [path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.yaml"))]
    commit, below = folder.split(":")
    names = _git("ls-tree", "-r", "--name-only", commit, below).splitlines()
    return [_git("show", f"{commit}:{name}") for name in names if name.endswith(".yaml")]


def counts(files: list[str]) -> list[int]:
    """Files, lines of settings (not blank, not a comment), distinct ones, those in two files or more, comment lines."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in files]
    settings = [[line for line in one if not line.startswith("#")] for one in lines]
    held = Counter(line for one in settings for line in set(one))
    everything = [line for one in settings for line in one]
    comments = sum(map(len, lines)) - len(everything)
    return [len(files), len(everything), len(held), sum(held[line] > 1 for line in everything), comments]


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def main() -> None:
    folders = sys.argv[1:] or [str(ROOT / "recipes")]
    rows = [[folder, *counts(texts(folder))] for folder in folders]
    print(
        table(rows, ["recipes", "files", "lines of settings", "distinct", "in two files or more", "lines of comment"])
    )


if __name__ == "__main__":
    main()
