"""The LightningModule that trains a recipe's student, alone or together with the networks of its objective."""

from __future__ import annotations

from flowmap.build.discriminator import build_discriminator
from flowmap.build.fake_score import build_fake
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, PairedDataset
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import Adversarial, RewardTuning
from flowmap.plan.plan import ResolvedRun
from flowmap.student.config import StudentConfig
from flowmap.train.adversarial import AdversarialModule
from flowmap.train.auxiliary import AuxiliaryModule
from flowmap.train.module import DistillModule
from flowmap.train.reward import RewardModule


def module_of(
    run: ResolvedRun,
    config: StudentConfig,
    student: FlowMapNet,
    teacher: BuiltTeacher | None,
    data: Dataset,
    samples: Dataset | PairedDataset,
) -> DistillModule:
    """The module, with its auxiliary networks built. Raises RecipeError if one cannot be built."""
    recipe, parts = run.recipe, (run, student, teacher, data, samples)
    fake = build_fake(run, config, teacher)
    if isinstance(recipe.objective, Adversarial):
        return AdversarialModule(*parts, build_discriminator(run, config, teacher), fake)
    if isinstance(recipe.objective, RewardTuning):
        return RewardModule(*parts, fake=fake)
    return DistillModule(*parts) if recipe.objective.matching is None else AuxiliaryModule(*parts, fake=fake)
