"""Files in WordNet's format, small enough for tests: 80 definitions of four parts of speech."""

from __future__ import annotations

from pathlib import Path

WORDS = "cat dog fox hen cow pig owl bee ant eel".split()


def wordnet_files(folder: Path) -> Path:
    """Four data files; every word stands in three entries of each, alone in one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mark, category in (("noun", "n", 5), ("verb", "v", 30), ("adj", "a", 0), ("adv", "r", 2)):
        lines = ["  1 This is the licence."]
        for i, word in enumerate(WORDS):
            other = WORDS[(i + 1) % len(WORDS)]
            gloss = f'to say {word} and {other} {mark}; "a {word}!"; "ah"'
            lines.append(f"{i:08d} {category:02d} {mark} 02 {word} 0 {other.capitalize()}(p) 0 000 | {gloss}")
            lines.append(f"{i + 50:08d} {category:02d} {mark} 01 {word} 1 000 | {word}   again as {mark}  ")
        (folder / f"data.{name}").write_text("\n".join(lines) + "\n")
    return folder
