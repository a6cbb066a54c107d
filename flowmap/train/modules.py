"""Which LightningModule trains a recipe's student: alone, or with the networks that its objective wants beside it."""

from __future__ import annotations

from torch import nn

from flowmap.build.discriminator import build_discriminator
from flowmap.build.fake_score import build_fake
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, PairedDataset
from flowmap.objectives import Adversarial, ScoreDistillation
from flowmap.recipe import Recipe
from flowmap.student.config import StudentConfig
from flowmap.train.adversarial import AdversarialModule
from flowmap.train.auxiliary import BesideModule
from flowmap.train.module import DistillModule


def module_of(
    recipe: Recipe,
    config: StudentConfig,
    student: nn.Module,
    teacher: BuiltTeacher | None,
    data: Dataset,
    samples: Dataset | PairedDataset,
) -> DistillModule:
    """The module, with what trains beside the student built. RecipeError where that cannot be."""
    parts = (recipe, student, teacher, data, samples)
    fake = build_fake(recipe, config, teacher) if isinstance(recipe.distillation, ScoreDistillation) else None
    if isinstance(recipe.objective, Adversarial):
        return AdversarialModule(*parts, build_discriminator(recipe, config, teacher), fake)
    return DistillModule(*parts) if fake is None else BesideModule(*parts, fake=fake)
