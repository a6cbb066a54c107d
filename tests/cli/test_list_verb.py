"""`flowmap list` names every slot by its key in a recipe, and a recipe takes every kind that it lists there."""

from __future__ import annotations

import pytest

from flowmap.base.schema import RecipeError
from flowmap.cli.slots import keys_of_slots
from flowmap.recipe import read_recipe
from flowmap.recipe.kinds import TABLES


def test_every_slot_has_a_key():
    found = keys_of_slots()
    assert set(found) == set(TABLES)
    assert {"data", "data.images", "student.net", "coupling.teacher.guidance", "times.base"} <= {
        key for keys in found.values() for key in keys
    }


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


def test_a_word_filters_recipes_teachers_and_kinds(command):
    code, out, err = command("list", "MeanFlow")
    lines = out.splitlines()
    assert (
        (code, err) == (0, "")
        and lines[0] == "recipes"
        and lines[-2:] == ["objective, objective.base kinds", "  meanflow"]
    )
    assert any(line.startswith("  digits-meanflow ") for line in lines) and not any(
        line.startswith("  digits ") for line in lines
    )
    assert "teachers" not in lines, "none has the word"
    code, out, err = command("list", "times.base")
    assert code == 0 and out.splitlines()[-1].startswith("  uniform, logit_normal"), (
        "a slot's key lists all of its kinds"
    )
    assert command("list", "edm2")[1].count("teachers\n  edm2") == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("meanflw", "nothing matches 'meanflw', did you mean 'meanflow'?"),
        ("qqqqqq", "nothing matches 'qqqqqq'"),
        ("§", "nothing matches '§'"),
    ],
)
def test_a_word_that_nothing_has(command, word, says):
    code, out, err = command("list", word)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and err.startswith("flowmap: list: ") and says in err


def test_a_kind_that_is_like_no_other_may_be_the_users_own(command, tiny):
    for override, says in (
        ("times.kind=zzzz", "; --import FILE adds kinds of your own"),
        ("times.kind=unifrom", "did you mean 'uniform'?"),
    ):
        code, _, err = command("show", "--recipe", tiny, override)
        assert code == 2 and says in err and ("--import" in err) == ("zzzz" in override) and len(err.splitlines()) == 1
