"""The LightningModule of students that do not train alone: other networks step beside them, each by an optimiser of its own.

Lightning counts the steps of optimisers that it has wrapped. Those of the other networks are stepped as torch's own, so that global_step counts
the student's steps: trainer.steps, schedules, averages, checkpoints, logs and resuming are those of any other run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowmap.flow.draws import RowGenerator, normal_like
from flowmap.flow.types import Cond, Loss, PathSample
from flowmap.train.module import DistillModule, norm_of, trained


class BesideModule(DistillModule):
    """As DistillModule, with a fake score network (objectives/score_distillation.py) that trains beside the student where there is one.

    Networks beside the student are in state_dict() but in no average: they never ship. The micro-batches of a step are kept until its last;
    then the fake makes its own steps on all of them, and after that the student, so that a step is one of the whole batch for both.
    """

    def __init__(self, *parts, fake: nn.Module | None = None, **more):
        super().__init__(*parts, **more)
        self.automatic_optimization = False
        self._waiting: list[tuple[PathSample, RowGenerator]] = []
        if fake is not None:
            self.fake = fake.train()

    def auxiliary_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of the networks beside the student, by the name of the network, at their full learning rates."""
        if not hasattr(self, "fake"):
            return {}
        optimizer = self.recipe.optimizer(trained(self.fake))
        optimizer.param_groups[0]["lr"] = self.recipe.distillation.fake_lr or self.recipe.optimizer.lr
        return {"fake": optimizer}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        others = self.auxiliary_optimizers()
        self._names = tuple(others)
        self._full_lr = {name: optimizer.param_groups[0]["lr"] for name, optimizer in others.items()}
        return [self.recipe.optimizer(trained(self.student)), *others.values()]

    def configure_model(self) -> None:
        super().configure_model()
        if hasattr(self, "fake") and hasattr(self.fake.net, "activation_checkpointing"):
            self.fake.net.activation_checkpointing = self.recipe.trainer.activation_checkpointing

    def on_train_start(self) -> None:
        super().on_train_start()
        self._waiting = []

    def learn(self, sample: PathSample, generator: RowGenerator) -> None:
        self._waiting.append((sample, generator))
        if self._micro:
            return
        drawn, self._waiting = self._waiting, []
        if hasattr(self, "fake"):
            for _ in range(self.recipe.distillation.fake_steps):
                self._fake_step(drawn)
        for sample, generator in drawn:
            self.descend(sample, generator, 1 / len(drawn))
        self.step_student()

    def descend(self, sample: PathSample, generator: RowGenerator, share: float) -> None:
        """Adds `share` of the micro-batch's gradient to that of every network that steps with the student."""
        loss = self.distillation_loss(sample, generator)
        (loss.value * share).backward()
        self.last_loss = Loss(loss.value.detach(), loss.logs)

    def distillation_loss(self, sample: PathSample, generator: RowGenerator) -> Loss:
        """What the student descends on the micro-batch by what it is compared with its teacher by; kept for the logs."""
        objective, teacher = self.recipe.distillation, self.teacher and self.teacher.guided
        if not hasattr(self, "fake"):
            loss = objective(self.student, teacher, sample, self.global_step)
            self.keep(sample, loss)
            return loss
        sample, num_jumps = self._looked_at(sample.x1, sample.cond, generator)
        loss = objective(self.fake, teacher, sample, self.global_step)
        loss = Loss(loss.value, {**loss.logs, "jumps": torch.tensor(float(num_jumps)), "fake_loss": self._fake_loss})
        self.keep(sample, loss)
        return loss

    def _fake_step(self, drawn: list[tuple[PathSample, RowGenerator]]) -> None:
        """One step of the fake on samples that the student makes from new noise, with the conditions of the micro-batches."""
        for sample, generator in drawn:
            with torch.no_grad():
                made, _ = self._looked_at(normal_like(sample.x1, generator), sample.cond, generator)
            loss = self.recipe.distillation.learn(self.fake, made)
            self.keep(made, loss)
            self._fake_loss = loss.value.detach()
            (loss.value / len(drawn)).backward()
        self.step_beside("fake")

    def _looked_at(self, x1: Tensor, cond: Cond | None, generator: RowGenerator) -> tuple[PathSample, int]:
        """The student's samples from x1 with fresh noise and times of the recipe's law, and in how many jumps they were made."""
        x0, num_jumps = self.recipe.distillation.samples(self.recipe.sampler, self.student, x1, cond, generator)
        noise = normal_like(x1, generator)
        t, s = self.recipe.times(len(x1), device=x1.device, generator=generator)
        return self.recipe.path.sample(x0, noise, t, s, cond), num_jumps

    def step_beside(self, name: str) -> None:
        """The network of that name steps, at its own learning rate on the student's schedule."""
        schedule, optimizer = (
            self.recipe.optimizer,
            self.optimizers()[1 + self._names.index(name)].optimizer,
        )  # torch's own: not counted
        lr = schedule.lr_at(self.global_step, self.recipe.trainer.steps)
        optimizer.param_groups[0]["lr"] = self._full_lr[name] * lr / schedule.lr
        self._step(optimizer, trained(getattr(self, name)), name)

    def step_student(self) -> None:
        self._step(self.optimizers()[0], trained(self.student))

    def _step(self, optimizer, parameters: list[nn.Parameter], name: str | None = None) -> None:
        """The gradients' mean over processes, clipped as the student's are, then the step. The student's own norm is looked at by a hook."""
        self._average_gradients(parameters)
        if name is not None:
            self._must_be_finite(
                f"norm of the {name}'s gradient", norm_of([p.grad for p in parameters if p.grad is not None])
            )
        if self.recipe.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm)
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
