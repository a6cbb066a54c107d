"""A part of a user states what it needs; the rest are defaults, and what it states wins."""

from dataclasses import dataclass, replace

import pytest

from flowmap.flow.parts import BaseObjective, complete
from flowmap.flow.types import Loss
from flowmap.nets import DISCRIMINATORS
from flowmap.objectives import Adversarial
from flowmap.recipe.recipe import read_recipe


def bare(**members):
    """The class of an objective that inherits from nothing and states only those members."""

    class Bare:
        size: float = 1.0

        def __call__(self, student, teacher, sample, step):
            return Loss(sample.xt.sum())

    for name, value in members.items():
        setattr(Bare, name, value)
    return dataclass(frozen=True)(Bare)


def test_a_class_gets_the_members_that_it_lacks():
    kind = bare(diagonal=True, derivative="difference")
    complete(kind, BaseObjective)
    found = kind()
    assert (found.diagonal, found.derivative, found.artifact) == (True, "difference", "student")
    assert (found.learns_weight, found.draws_samples, found.sees_pictures) == (False, False, False)
    assert (found.loss_net, found.null_weight, found.check(None)) == (None, 0.0, None) and found.distillation is found


def test_a_field_without_a_default_is_no_missing_member():
    @dataclass(frozen=True)
    class Named:
        derivative: str

    complete(Named, BaseObjective)
    assert Named("dual").derivative == "dual" and Named("dual").diagonal is False


def test_the_nearest_class_of_the_defaults_wins():
    class Changed(BaseObjective):
        null_weight = 0.5

    kind = bare()
    complete(kind, Changed)
    assert kind().null_weight == 0.5


def test_a_recipe_takes_an_objective_that_inherits_from_nothing():
    digits = read_recipe("digits")
    recipe = replace(digits, objective=bare()())
    assert recipe.artifact == "student" and recipe.key == "objective" and recipe.distillation is recipe.objective
    kept = replace(digits, objective=Adversarial(bare()(), DISCRIMINATORS["conv"]()))
    assert (kept.key, kept.objective.diagonal, kept.distillation.derivative) == ("objective.base", False, None)


def test_a_part_of_a_user_may_refuse_a_recipe():
    def check(self, recipe):
        raise ValueError(f"{recipe.key}.size: {self.size} is not for seed {recipe.seed}")

    with pytest.raises(ValueError, match="objective.size: 1.0 is not for seed 3"):
        replace(read_recipe("digits", ["seed=3"]), objective=bare(check=check)())
