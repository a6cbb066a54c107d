"""A student that starts from its teacher with more outputs than the teacher has, or from a network that cannot."""

import pytest

from flowmap.base.schema import RecipeError
from flowmap.nets import ADM, MLP, DiT
from flowmap.plan.named_networks import as_started
from flowmap.recipe import read_recipe


def test_a_student_from_its_teacher_has_the_recipes_number_of_outputs_and_the_teachers_prediction():
    recipe = read_recipe("digits-pi-flow")
    assert as_started(recipe, DiT(preset="nano", prediction="data")) == DiT(preset="nano", prediction="data", points=8)
    assert as_started(recipe, MLP(width=16)) == MLP(width=16, points=8)
    assert as_started(read_recipe("digits"), MLP(width=16)) == MLP(width=16)
    both = read_recipe("digits-pi-flow", ["student.arrival_blocks=2"])
    assert as_started(both, DiT(preset="nano")) == DiT(preset="nano", points=8, arrival_blocks=2)


def test_what_has_one_output_is_named():
    with pytest.raises(RecipeError, match="student.points: a network of kind edm_adm has one output; leave it out"):
        as_started(read_recipe("digits-pi-flow"), ADM())
    with pytest.raises(RecipeError, match="points"):
        read_recipe("digits-pi-flow", ["student.points=0"])
