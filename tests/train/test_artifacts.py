"""The artifacts of runs: every name that an objective or a network declares has its entry, and no other trains it."""

import pytest

from flowmap.base.schema import RecipeError
from flowmap.nets import NETS
from flowmap.objectives import OBJECTIVES
from flowmap.recipe import read_recipe
from flowmap.recipe.kinds import student_part
from flowmap.train.artifacts import ARTIFACTS


def test_the_table_is_what_objectives_and_networks_declare():
    objectives = {objective.artifact for objective in OBJECTIVES.values()}
    assert set(ARTIFACTS) == objectives == {student_part(net).artifact for net in NETS.values()}


@pytest.mark.parametrize("objective", ["reconstruction", "text_elbo", "variance_guided"])
def test_an_objective_trains_its_own_kind_alone(objective):
    with pytest.raises(RecipeError, match=f"objective: {objective} does not train a student of kind dit; allowed: "):
        read_recipe("digits-teacher", [f"objective={{kind: {objective}}}"])
