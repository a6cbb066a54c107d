"""`flowmap list` names every slot by its key in a recipe, and a recipe takes every kind that it lists there."""

from __future__ import annotations

import pytest

from flowmap.base.schema import RecipeError
from flowmap.cli.slots import keys_of_slots
from flowmap.kinds import TABLES
from flowmap.recipe import read_recipe


def test_every_slot_has_a_key():
    found = keys_of_slots()
    assert set(found) == set(TABLES)
    assert {"data", "data.images", "student.net", "coupling.teacher.guidance", "times.base"} <= {key for keys in found.values() for key in keys}


@pytest.mark.parametrize("key", ["times", "sampler", "objective.distance", "ema"])
def test_what_stands_under_a_key_is_what_a_recipe_takes_there(key):
    slot = next(slot for slot, keys in keys_of_slots().items() if key in keys)
    objective = ["objective={kind: meanflow}"] if key.startswith("objective.") else []
    with pytest.raises(RecipeError, match=f"{key}.kind: no 'none_such'.*allowed: {', '.join(TABLES[slot])}"):
        read_recipe("digits", [*objective, f"{key}={{kind: none_such}}"])


def test_the_verb(command):
    code, out, err = command("list")
    assert (code, err) == (0, "") and "netspec" not in out
    assert "data.images kinds\n  folder, huggingface" in out and "data.autoencoder (text) kinds\n  text\n" in out
