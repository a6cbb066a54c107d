"""The LightningModule of adversarial finetuning: a student and a discriminator that step together, each with an
optimizer of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, PairedDataset
from flowmap.flow.draws import RowGenerator, normal_like, one_of
from flowmap.flow.types import Loss, PathSample
from flowmap.nets.flow_map import BESIDE_NET, SILENT, FlowMapNet
from flowmap.objectives import Adversarial
from flowmap.objectives.adversarial import discriminator_loss, generate, generator_loss
from flowmap.plan.plan import ResolvedRun
from flowmap.train.auxiliary import Auxiliary, AuxiliaryModule


def discriminator_of(objective: Adversarial, net: nn.Module) -> Auxiliary:
    """The discriminator as a network that trains together with the student."""

    def optimizer() -> torch.optim.Optimizer:
        lr, betas = objective.discriminator_lr, objective.discriminator_betas
        return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0.0)

    return Auxiliary("discriminator", net, optimizer)


class AdversarialModule(AuxiliaryModule):
    """An AuxiliaryModule with a discriminator.

    Its gradients and the student's are taken at the same weights and averaged over micro-batches and processes; then
    both step. The factors that balance the student's two losses are computed for each micro-batch, from the gradients
    of all processes.
    """

    def __init__(
        self,
        run: ResolvedRun,
        student: FlowMapNet,
        teacher: BuiltTeacher | None,
        data: Dataset,
        samples: Dataset | PairedDataset | None,
        discriminator: nn.Module,
        fake: FlowMapNet | None = None,
    ):
        super().__init__(run, student, teacher, data, samples, fake=fake)
        assert isinstance(self.recipe.objective, Adversarial)
        self.objective = self.recipe.objective
        self.discriminator = discriminator.train()
        self.auxiliaries += (discriminator_of(self.objective, self.discriminator),)
        # in a tuple, so that this parameter of the student is not registered once more
        self._last_layer = (last_layer(self.student),)

    def descend(self, sample: PathSample, generator: RowGenerator, share: float) -> None:
        objective = self.objective
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
        logs |= {"distillation_loss": base.value.detach(), "generator_steps": torch.tensor(float(num_steps))}
        self.last_loss = Loss(total.detach(), {**base.logs, **logs, **judged.logs})

    def step_student(self) -> None:
        self.step_auxiliary("discriminator")
        super().step_student()

    def _generated(self, sample: PathSample, generator: RowGenerator) -> tuple[Tensor, int]:
        """The student's samples from the batch's own noise, and their number of steps, drawn from objective.steps."""
        objective = self.objective
        num_steps = objective.steps[one_of(len(objective.steps), generator)]
        x0 = generate(
            self.recipe.sampler,
            self.student,
            sample.x1,
            sample.cond,
            steps=num_steps,
            generator=generator,
            through=objective.through,
        )
        return x0, num_steps

    def _balanced(self, base: Tensor, against: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's whole loss, and its parts and factors for the logs."""
        norms = torch.ones(2, device=base.device)
        if self.objective.balance != "none":
            norms = torch.stack([self._norm_at_last_layer(base), self._norm_at_last_layer(against)])
        of_base, of_adversarial = self.objective.factors(norms[0], norms[1], self.global_step)
        logs = {"adversarial_loss": against.detach(), "factor_base": of_base, "factor_adversarial": of_adversarial}
        return of_base * base + of_adversarial * against, logs

    def _norm_at_last_layer(self, loss: Tensor) -> Tensor:
        """The norm of the gradient of the mean over processes."""
        (gradient,) = torch.autograd.grad(loss, self._last_layer, retain_graph=True)
        return self._mean(gradient.float()).norm()


def last_layer(student: nn.Module) -> nn.Parameter:
    """The last trained matrix or kernel outside the branches for times, guidance and uncertainty.

    For every network of flowmap that is its output layer.
    """
    apart = (*SILENT, BESIDE_NET)
    found = [
        p
        for name, p in student.named_parameters()
        if p.requires_grad and p.ndim >= 2 and not any(part in name for part in apart)
    ]
    return found[-1]
