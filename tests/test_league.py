"""benchmarks/league.py puts digits-X on fashion14 with another base.

benchmarks/recipe_lines.py counts repeated lines of recipes.
"""

from pathlib import Path

import pytest

from flowmap.recipe import read_recipe


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_a_method_on_digits_becomes_that_method_on_fashion14(benchmarks, tmp_path):
    from league import RECIPES, over

    fashion = read_recipe("fashion14")
    for name in RECIPES:
        mine, digits = read_recipe(over("fashion14", name, tmp_path)), read_recipe(name)
        assert mine.name == digits.name.replace("digits", "fashion14")
        assert (mine.data, mine.teacher.card, mine.evaluation) == (fashion.data, "fashion14", fashion.evaluation)
        assert (mine.objective, mine.times, mine.optimizer, mine.ema) == (
            digits.objective,
            digits.times,
            digits.optimizer,
            digits.ema,
        )
    warm = read_recipe(tmp_path / "fashion14-warm.yaml")
    assert read_recipe(warm.student.recipe).name == "fashion14-cmt" and warm.trainer.steps == 3400
    mine = str(tmp_path / "fashion14-warm.yaml")
    assert over("fashion14", mine, tmp_path) == mine, "a recipe of those data stays"
    with pytest.raises(SystemExit, match="is not over data/digits"):
        over("fashion14", "lediflow/digits-ayf", tmp_path)


def test_a_row_is_compared_with_the_default_within_seeds(benchmarks):
    from tables.league import ratios

    figures = {"a": (1.0, 2.0), "b": (0.5, 3.0), "c": (2.0, None)}
    results = [
        {"recipe": name, "seed": seed, "figures": {"1": {"d": value}} if value else {}}
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]
    recipes = {name: {"figures": {}} for name in figures}
    found = {"terms": {"steps": [1], "seeds": 2}, "recipes": recipes, "results": results}
    table = ratios(found, "d", "a")
    assert table["columns"] == ["d, over a's", "1 step"]
    assert table["rows"] == [["b", "1 (0.5 to 1.5); less in 1 of 2"], ["c", "2; less in 0 of 1"]]


def test_lines_of_recipes_are_counted(benchmarks):
    from recipe_lines import counts

    first, second = "# one\n\nseed: 1\ndata: {kind: digits}\n", "seed: 1\nseed: 1\n  # two\n"
    assert counts([first, second]) == [2, 4, 2, 3, 2]
