"""Every shipped name resolves to the settings in tests/recipe/resolved.yaml, letter by letter, and so to the same hash.

Settings that a later version added are there only where a recipe sets them.

After a change of settings that is meant: `python tests/recipe/test_resolved.py --write`, and read the difference.
"""

import difflib
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flowmap.base.schema import to_plain
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import list_recipes, read_recipe

HELD = Path(__file__).with_name("resolved.yaml")
MARK = "--- # "  # begins the document of each name in the file; the name and the hash follow


def resolved(name: str) -> str:
    """The document of that name: its mark, name and hash, then the resolved text."""
    recipe = read_recipe(name)
    return f"{MARK}{name} {recipe.hash()}\n{OmegaConf.to_yaml(OmegaConf.create(to_plain(recipe, TABLES, hashed=True)))}"


def held() -> dict[str, str]:
    parts = HELD.read_text(encoding="utf-8").split(MARK)[1:]
    return {part.split(" ", 1)[0]: f"{MARK}{part}" for part in parts}


def test_the_shipped_names_are_those_held():
    assert list_recipes() == sorted(held())


@pytest.mark.parametrize("name", sorted(held()) if HELD.is_file() else [])
def test_a_name_resolves_to_the_settings_held(name):
    before, now = held()[name], resolved(name)
    assert now == before, "\n".join(
        difflib.unified_diff(before.splitlines(), now.splitlines(), "held", "now", n=0, lineterm="")
    )


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    HELD.write_text("".join(map(resolved, list_recipes())), encoding="utf-8")
