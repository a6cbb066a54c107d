"""Build an adversarial recipe's discriminator and connect it with the network whose features it reads."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher
from flowmap.flow.types import Cond
from flowmap.objectives.adversarial import Adversarial, DiscriminatorSpec, FeaturesSpec
from flowmap.objectives.perceptual import perceptual
from flowmap.recipe import Recipe
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of


def build_discriminator(recipe: Recipe, config: StudentConfig, teacher: BuiltTeacher | None) -> nn.Module:
    """Return D(x, cond, noise) -> (B,) for the student's samples, its weights drawn with the recipe's seed.

    Raises RecipeError if it cannot read such samples.
    """
    spec = _spec(recipe)
    if spec.trunk != "teacher":
        return discriminator_on(recipe, config, None, {})
    if teacher is None or teacher.network is None:
        raise RecipeError(f"{recipe.name}: objective.discriminator.kind: 'teacher' needs a teacher that is a network")
    network = teacher.network
    return discriminator_on(recipe, config, network.flow_map.net, conditions_of(network.config, 1))


def discriminator_on(recipe: Recipe, config: StudentConfig, network: nn.Module | None, example: Cond) -> nn.Module:
    """Return the discriminator as build_discriminator does, given the teacher's network and one row of its
    conditions.
    """
    spec = _spec(recipe)
    where = "objective.discriminator"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            more = {"teacher": {"network": network, "example": example}}.get(spec.trunk, {})
            if spec.trunk == "features":
                assert isinstance(spec, FeaturesSpec)
                more = {"call": _call(spec.net)}
            return spec.build(config.shape, num_classes=config.num_classes, **more)
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: {where}.{error}") from error


def _spec(recipe: Recipe) -> DiscriminatorSpec:
    assert isinstance(recipe.objective, Adversarial)
    return recipe.objective.discriminator


def _call(name: str):
    """Return the frozen network of that name, on the CPU, as a callable that returns features."""
    # A copy, because it moves to the device of the heads.
    net = copy.deepcopy(perceptual(name, torch.device("cpu")))
    return _Features(net) if name == "efficientnet_lite0" else net


class _Features(nn.Module):
    """The features of a perceptual distance's network, at all its depths."""

    net: Any  # A network with `features`.

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.features(x)
