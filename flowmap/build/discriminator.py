"""Build an adversarial recipe's discriminator and connect it with the network whose features it reads."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher
from flowmap.objectives.adversarial import Adversarial, DiscriminatorSpec, FeaturesSpec
from flowmap.objectives.perceptual import perceptual
from flowmap.plan.plan import ResolvedRun
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of


def build_discriminator(run: ResolvedRun, config: StudentConfig, teacher: BuiltTeacher | None) -> nn.Module:
    """Return D(x, cond, noise) -> (B,) for the student's samples, its weights drawn with the recipe's seed.

    Raises RecipeError if it cannot read such samples.
    """
    assert isinstance(run.recipe.objective, Adversarial)
    spec = run.recipe.objective.discriminator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.recipe.seed)
        try:
            trunk = _trunk(run, spec, teacher)
            return spec.build(config.shape, num_classes=config.num_classes, **trunk)
        except ValueError as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{run.name}: objective.discriminator.{error}") from error


def _trunk(run: ResolvedRun, spec: DiscriminatorSpec, teacher: BuiltTeacher | None) -> dict[str, Any]:
    """Return the frozen network whose features the discriminator reads, as its specification takes it."""
    if isinstance(spec, FeaturesSpec):
        return {"call": _call(spec.net)}
    if spec.trunk != "teacher":
        return {}
    if teacher is None or teacher.network is None:
        raise RecipeError(f"{run.name}: objective.discriminator.kind: 'teacher' needs a teacher that is a network")
    network = teacher.network
    return {"network": network.flow_map.net, "example": conditions_of(network.config, 1)}


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
