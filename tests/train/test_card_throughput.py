"""The model card states the samples drawn a second, where evaluation timed them."""

from flowmap.recipe import read_recipe
from flowmap.train.card import throughput


def test_the_samples_of_the_figures_over_their_seconds():
    recipe = read_recipe("digits")
    num = max(spec.num_starts for spec in recipe.metrics)
    metrics = {"student": {"1": {}, "4": {}, "8": {}}, "seconds": {"student_1": num / 1234, "student_4": num / 308.6}}
    line = throughput(recipe, metrics)[-1]
    assert line.startswith("Samples a second: 1,234 in 1 step, 308.6 in 4 steps (")
    assert throughput(recipe, None) == throughput(recipe, {"student": {"1": {}}, "seconds": {}}) == []
