"""A score distillation's fake: the network that learns the velocity of the student's own samples, as it is at step 0."""

from __future__ import annotations

from dataclasses import replace

from flowmap.build.student import build_student
from flowmap.build.teacher import BuiltTeacher
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.stacked import net_within
from flowmap.recipe import Recipe
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.config import StudentConfig


def fake_config(recipe: Recipe, config: StudentConfig, teacher: BuiltTeacher | None = None) -> StudentConfig:
    """What the fake is: the student's network, one of a stack, without an arrival time (unless the teacher's network has it), told the same."""
    network = None if teacher is None else teacher.network
    arrival = network is not None and network.config.arrival and _starts_as_teacher(recipe, teacher)
    return replace(config, net=net_within(config.net), arrival=arrival)


def build_fake(recipe: Recipe, config: StudentConfig, teacher: BuiltTeacher | None) -> FlowMapNet:
    """The fake, its weights the teacher's where the student starts from that or from another recipe, else random by the recipe's seed.

    RecipeError where the student's network is not the teacher's.
    """
    start = (
        recipe.changed(student=FromTeacher()) if _starts_as_teacher(recipe, teacher) and recipe.lora is None else recipe
    )
    return build_student(start, fake_config(recipe, config, teacher), teacher)


def _starts_as_teacher(recipe: Recipe, teacher: BuiltTeacher | None) -> bool:
    return teacher is not None and teacher.network is not None and isinstance(recipe.start, (FromTeacher, FromRecipe))
