"""The LightningModule of adversarial finetuning: a student and a discriminator that step together, each by an optimiser of its own.

Lightning counts the steps of optimisers that it has wrapped. The discriminator's is stepped as torch's own, so that global_step counts the
student's steps: trainer.steps, schedules, averages, checkpoints, logs and resuming are those of any other run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowmap.flow.prior import normal_like
from flowmap.flow.types import Loss, PathSample
from flowmap.nets.flow_map import SILENT
from flowmap.objectives.adversarial import discriminator_loss, generate, generator_loss
from flowmap.train.module import DistillModule, norm_of, trained


class AdversarialModule(DistillModule):
    """As DistillModule, with a discriminator that is in state_dict() but in no average: it never ships.

    Both nets' gradients are taken at the same weights, averaged over micro-batches and processes; then both step. The factors that balance the
    student's two losses are found for each micro-batch, on the gradients of all processes.
    """

    def __init__(self, recipe, student, teacher, data, samples, discriminator: nn.Module):
        super().__init__(recipe, student, teacher, data, samples)
        self.automatic_optimization = False
        self.discriminator = discriminator.train()
        self._last_layer = (last_layer(self.student),)  # in a tuple: it is a parameter of the student, not one more of this module

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        objective = self.recipe.objective
        judge = torch.optim.AdamW(
            self.discriminator.parameters(), lr=objective.discriminator_lr, betas=objective.discriminator_betas, weight_decay=0.0
        )
        return [self.recipe.optimizer(trained(self.student)), judge]

    def training_step(self, batch, batch_idx: int) -> None:
        sample, generator = self.draw(batch)
        last_of_step = self._micro == 0
        objective, accumulate = self.recipe.objective, self.recipe.trainer.accumulate
        with self.dropping(generator):
            base = objective(self.student, self.teacher and self.teacher.guided, sample, self.global_step)
            fake, num_steps = self._generated(sample, generator)
        noise = normal_like(fake.detach(), generator)
        self.discriminator.requires_grad_(False)
        against = generator_loss(self.discriminator, sample.x0, fake, sample.cond, noise)
        self.discriminator.requires_grad_(True)
        total, logs = self._balanced(base.value, against)
        self.keep(sample, Loss(total, base.logs))
        (total / accumulate).backward()
        judged = discriminator_loss(self.discriminator, sample.x0, fake, sample.cond, noise, r1=objective.r1, r2=objective.r2)
        self._must_be_finite("discriminator's loss", judged.value.detach())
        (judged.value / accumulate).backward()
        logs |= {"distillation_loss": base.value.detach(), "generator_steps": torch.tensor(float(num_steps)), **judged.logs}
        self.last_loss = Loss(total.detach(), {**base.logs, **logs})
        if last_of_step:
            self._step()

    def _generated(self, sample: PathSample, generator: torch.Generator) -> tuple[Tensor, int]:
        """The student's samples from the batch's own noise, and in how many steps: one of objective.steps, drawn for the micro-batch."""
        objective = self.recipe.objective
        place = int(torch.randint(len(objective.steps), (), generator=generator, device=sample.x1.device))
        num_steps = objective.steps[place]
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

    def _step(self) -> None:
        student, judge = self.optimizers()
        schedule, judge = self.recipe.optimizer, judge.optimizer  # torch's own: Lightning does not count its steps
        lr = schedule.lr_at(self.global_step, self.recipe.trainer.steps)
        judge.param_groups[0]["lr"] = self.recipe.objective.discriminator_lr * lr / schedule.lr
        nets = (trained(self.student), list(self.discriminator.parameters()))
        for parameters in nets:
            self._average_gradients(parameters)
        self._must_be_finite("norm of the discriminator's gradient", norm_of([p.grad for p in nets[1] if p.grad is not None]))
        if schedule.clip_norm:
            for parameters in nets:
                nn.utils.clip_grad_norm_(parameters, schedule.clip_norm)
        for optimizer in (judge, student):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.trainer.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        whole = self._mean(torch.cat([p.grad.flatten() for p in parameters]))
        for parameter, mean in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes."""
        if self.trainer.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.trainer.world_size


def last_layer(student: nn.Module) -> nn.Parameter:
    """The last matrix or kernel that is trained, branches for arrival time and guidance apart: for every net of ours, that of its output."""
    found = [p for name, p in student.named_parameters() if p.requires_grad and p.ndim >= 2 and not any(part in name for part in SILENT)]
    return found[-1]
