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
    with pytest.raises(SystemExit, match="is not over data/digits"):
        over("fashion14", "lediflow/digits-ayf", tmp_path)


def test_lines_of_recipes_are_counted(benchmarks):
    from recipe_lines import counts

    first, second = "# one\n\nseed: 1\ndata: {kind: digits}\n", "seed: 1\nseed: 1\n  # two\n"
    assert counts([first, second]) == [2, 4, 2, 3, 2]
