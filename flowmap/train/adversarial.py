"""The LightningModule of adversarial finetuning: a student and a discriminator that step together, each with an
optimizer of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, PairedDataset
from flowmap.flow.draws import RowGenerator, normal_like
from flowmap.flow.types import Loss, PathSample
from flowmap.nets.flow_map import BESIDE_NET, SILENT, FlowMapNet
from flowmap.objectives import Adversarial
from flowmap.objectives.adversarial import discriminator_loss, generator_loss
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.optimizer import adamw
from flowmap.train.auxiliary import Auxiliary, AuxiliaryModule
from flowmap.train.module import trained


def discriminator_of(objective: Adversarial, net: nn.Module) -> Auxiliary:
    """The discriminator as a network that trains together with the student."""

    def optimizer() -> torch.optim.Optimizer:
        lr, betas = objective.discriminator_lr, objective.discriminator_betas
        return adamw(net.parameters(), lr=lr, betas=betas, weight_decay=0.0)

    return Auxiliary("discriminator", net, optimizer)


class AdversarialModule(AuxiliaryModule):
    """An AuxiliaryModule with a discriminator.

    Its gradients and the student's are taken at the same weights and averaged over micro-batches and processes; then
    both step. The factors that balance the student's two losses are those of the gradients of the whole step: with
    several micro-batches, those of either loss are kept apart until the last one.
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
        self._of_base: list[Tensor] = []  # the step's gradient of the base's loss, where the two are kept apart

    def descend(self, sample: PathSample, generator: RowGenerator, share: float) -> None:
        objective = self.objective
        if not self._judges:
            return super().descend(sample, generator, share)
        base = self.distillation_loss(sample, generator)
        fake, num_steps = self._generated(sample, generator)
        noise = normal_like(fake.detach(), generator)
        self.discriminator.requires_grad_(False)
        against = generator_loss(self.discriminator, sample.x0, fake, sample.cond, noise)
        self.discriminator.requires_grad_(True)
        both = lambda: (base.value + against, {"adversarial_loss": against.detach()})
        total, logs = both() if self._kept_apart else self._balanced(base.value, against)
        self._must_be_finite("loss", total.detach())
        if self._kept_apart:
            self._descend_apart(base.value * share, against * share)
        else:
            (total * share).backward()
        judged = discriminator_loss(
            self.discriminator, sample.x0, fake, sample.cond, noise, r1=objective.r1, r2=objective.r2
        )
        self._must_be_finite("discriminator's loss", judged.value.detach())
        (judged.value * share).backward()
        logs |= {"distillation_loss": base.value.detach(), "generator_steps": torch.tensor(float(num_steps))}
        self.last_loss = Loss(total.detach(), {**base.logs, **logs, **judged.logs})

    def step_student(self) -> None:
        if self._judges:
            self.step_auxiliary("discriminator")
        if self._of_base:
            self._join()
        super().step_student()

    @property
    def _judges(self) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.global_step >= self.objective.discriminator_start

    @property
    def _kept_apart(self) -> bool:
        return self.objective.balance != "none" and self.recipe.batches.accumulate > 1

    def _descend_apart(self, base: Tensor, against: Tensor) -> None:
        """Add the gradient of the base's loss to `_of_base`, and that of the adversarial one to the parameters'."""
        parameters = trained(self.student)
        found = torch.autograd.grad(base, parameters, materialize_grads=True)
        if self._of_base:
            torch._foreach_add_(self._of_base, list(found))
        else:
            self._of_base = list(found)
        against.backward()

    def _join(self) -> None:
        """Make the parameters' gradients the sum of those of both losses, with the factors of the whole step."""
        parameters, of_base = trained(self.student), self._of_base
        self._of_base = []
        last = next(i for i, p in enumerate(parameters) if p is self._last_layer[0])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norms = [self._norm_of_mean(grads[last]) for grads in (of_base, gradients)]
        base, adversarial = self.objective.factors(norms[0], norms[1], self.global_step)
        for parameter, one, other in zip(parameters, of_base, gradients, strict=True):
            parameter.grad = base * one + adversarial * other
        assert self.last_loss is not None, "a micro-batch has been learned from"
        factors = {"factor_base": base, "factor_adversarial": adversarial}
        self.last_loss = Loss(self.last_loss.value, {**self.last_loss.logs, **factors})

    def _generated(self, sample: PathSample, generator: RowGenerator) -> tuple[Tensor, int]:
        """The student's samples from the batch's own noise, and their number of steps, drawn from objective.steps."""
        return self.objective.generated(self.recipe.sampler, self.student, sample.x1, sample.cond, generator)

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
        return self._norm_of_mean(gradient)

    def _norm_of_mean(self, gradient: Tensor) -> Tensor:
        """The norm of the mean over processes, in float32 or better."""
        return self._mean(gradient.to(torch.promote_types(gradient.dtype, torch.float32))).norm()


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
