"""The LightningModule of reward tuning: a student that descends its base's loss and climbs a reward of its samples."""

from __future__ import annotations

import torch

from flowmap.flow.draws import RowGenerator
from flowmap.flow.types import Loss, PathSample
from flowmap.objectives.reward_tuning import RewardTuning
from flowmap.train.auxiliary import AuxiliaryModule


class RewardModule(AuxiliaryModule):
    """An AuxiliaryModule, with a fake score network if the base is a score distillation."""

    def distillation_loss(self, sample: PathSample, generator: RowGenerator) -> Loss:
        """The base's loss minus the scaled reward; kept for the logs."""
        objective = self.recipe.objective
        assert isinstance(objective, RewardTuning)
        base = super().distillation_loss(sample, generator)
        if self.global_step < objective.start:
            return base
        seen, _ = self.last  # a score distillation's own samples have taken the place of the batch
        x0, logs = seen.x0, base.logs
        if objective.own_samples:
            x0, num_steps = objective.generated(self.recipe.sampler, self.student, sample.x1, sample.cond, generator)
            logs = {**logs, "sample_steps": torch.tensor(float(num_steps))}
        loss = objective.with_reward(Loss(base.value, logs), self.student, x0, seen.cond)
        self.keep(seen, loss)
        return loss
