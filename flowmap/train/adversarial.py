"""The LightningModule of adversarial finetuning: a student and a discriminator that step together, each by an optimiser of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmap.flow.draws import RowGenerator, normal_like, one_of
from flowmap.flow.types import Loss, PathSample
from flowmap.nets.flow_map import BESIDE_NET, SILENT
from flowmap.objectives.adversarial import discriminator_loss, generate, generator_loss
from flowmap.train.auxiliary import BesideModule


class AdversarialModule(BesideModule):
    """As BesideModule, with a discriminator.

    Its gradients and the student's are taken at the same weights, averaged over micro-batches and processes; then both step. The factors that
    balance the student's two losses are found for each micro-batch, on the gradients of all processes.
    """

    def __init__(
        self, recipe, student, teacher, data, samples, discriminator: nn.Module, fake: nn.Module | None = None
    ):
        super().__init__(recipe, student, teacher, data, samples, fake=fake)
        self.discriminator = discriminator.train()
        self._last_layer = (
            last_layer(self.student),
        )  # in a tuple: it is a parameter of the student, not one more of this module

    def auxiliary_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        objective = self.recipe.objective
        judge = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=objective.discriminator_lr,
            betas=objective.discriminator_betas,
            weight_decay=0.0,
        )
        return {**super().auxiliary_optimizers(), "discriminator": judge}

    def descend(self, sample: PathSample, generator: RowGenerator, share: float) -> None:
        objective = self.recipe.objective
        base = self.distillation_loss(sample, generator)
        fake, num_steps = self._generated(sample, generator)
        noise = normal_like(fake.detach(), generator)
        self.discriminator.requires_grad_(False)
        against = generator_loss(self.discriminator, sample.x0, fake, sample.cond, noise)
        self.discriminator.requires_grad_(True)
        total, logs = self._balanced(base.value, against)
        self._must_be_finite("loss", total.detach())
        (total * share).backward()
        judged = discriminator_loss(
            self.discriminator, sample.x0, fake, sample.cond, noise, r1=objective.r1, r2=objective.r2
        )
        self._must_be_finite("discriminator's loss", judged.value.detach())
        (judged.value * share).backward()
        logs |= {
            "distillation_loss": base.value.detach(),
            "generator_steps": torch.tensor(float(num_steps)),
            **judged.logs,
        }
        self.last_loss = Loss(total.detach(), {**base.logs, **logs})

    def step_student(self) -> None:
        self.step_beside("discriminator")
        super().step_student()

    def _generated(self, sample: PathSample, generator: RowGenerator) -> tuple[Tensor, int]:
        """The student's samples from the batch's own noise, and in how many steps: one of objective.steps, drawn for the step."""
        objective = self.recipe.objective
        num_steps = objective.steps[one_of(len(objective.steps), generator)]
        how = {"steps": num_steps, "generator": generator, "through": objective.through}
        return generate(self.recipe.sampler, self.student, sample.x1, sample.cond, **how), num_steps

    def _balanced(self, base: Tensor, against: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's whole loss, and how it was put together."""
        objective = self.recipe.objective
        norms = torch.ones(2, device=base.device)
        if objective.balance != "none":
            norms = torch.stack([self._norm_at_last_layer(base), self._norm_at_last_layer(against)])
        of_base, of_adversarial = objective.factors(*norms, self.global_step)
        logs = {"adversarial_loss": against.detach(), "factor_base": of_base, "factor_adversarial": of_adversarial}
        return of_base * base + of_adversarial * against, logs

    def _norm_at_last_layer(self, loss: Tensor) -> Tensor:
        """Of the gradient of the mean over processes."""
        (gradient,) = torch.autograd.grad(loss, self._last_layer, retain_graph=True)
        return self._mean(gradient.float()).norm()


def last_layer(student: nn.Module) -> nn.Parameter:
    """The last matrix or kernel that is trained, branches for times, guidance and uncertainty apart: for every net of ours, that of its output."""
    apart = (*SILENT, BESIDE_NET)
    found = [
        p
        for name, p in student.named_parameters()
        if p.requires_grad and p.ndim >= 2 and not any(part in name for part in apart)
    ]
    return found[-1]
