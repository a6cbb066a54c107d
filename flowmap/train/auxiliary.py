"""The LightningModule of students that train together with other networks, each with an optimizer of its own.

Lightning counts the steps of optimizers that it has wrapped. Those of the auxiliary networks are stepped as torch's
own, so that global_step counts the student's steps: trainer.steps, schedules, averages, checkpoints, logs and resuming
are those of any other run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowmap.flow.draws import RowGenerator, normal_like
from flowmap.flow.types import Cond, Loss, PathSample
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import ScoreDistillation
from flowmap.recipe import Recipe
from flowmap.train.module import DistillModule, norm_of, trained

Drawn = list[tuple[PathSample, RowGenerator]]  # the micro-batches of a step


@dataclass(frozen=True)
class Auxiliary:
    """A network that trains together with the student: a fake score network, or a discriminator.

    It is in the state_dict() of the module under `name`, but in no average: it never ships. build_optimizer makes its
    optimizer at the full learning rate; `AuxiliaryModule` scales that by the student's schedule.
    """

    name: str
    net: nn.Module
    build_optimizer: Callable[[], torch.optim.Optimizer]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return trained(self.net)


def fake_score(recipe: Recipe, net: FlowMapNet) -> Auxiliary:
    """The fake score network of a score distillation (objectives/score_distillation.py)."""
    objective = recipe.distillation
    assert isinstance(objective, ScoreDistillation)
    lr = objective.fake_lr or recipe.optimizer.lr

    def optimizer() -> torch.optim.Optimizer:
        built = recipe.optimizer(trained(net))
        built.param_groups[0]["lr"] = lr
        return built

    return Auxiliary("fake", net, optimizer)


class AuxiliaryModule(DistillModule):
    """A DistillModule with a fake score network, if one is given.

    The micro-batches of a step are kept until the last one. Then the fake takes its own steps on all of them, and after
    that the student takes its step, so that a step is one of the whole batch for both.
    """

    fake: FlowMapNet | None

    def __init__(self, *parts: Any, fake: FlowMapNet | None = None, **more: Any):
        super().__init__(*parts, **more)
        self.automatic_optimization = False
        self.auxiliaries: tuple[Auxiliary, ...] = () if fake is None else (fake_score(self.recipe, fake),)
        self.fake = None if fake is None else fake.train()
        self._waiting: Drawn = []
        self._full_lr: dict[str, float] = {}
        self._fake_loss = torch.zeros(())

    @property
    def networks(self) -> list[FlowMapNet]:
        return [*super().networks, *([] if self.fake is None else [self.fake])]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        built = [one.build_optimizer() for one in self.auxiliaries]
        pairs = zip(self.auxiliaries, built, strict=True)
        self._full_lr = {one.name: optimizer.param_groups[0]["lr"] for one, optimizer in pairs}
        return [self.recipe.optimizer(trained(self.student)), *built]

    def configure_model(self) -> None:
        super().configure_model()
        if self.fake is not None:
            self.fake.checkpoint_activations(self.recipe.trainer.activation_checkpointing)
            self._to_channels_last(self.fake)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._waiting = []

    def learn(self, sample: PathSample, generator: RowGenerator) -> None:
        self._waiting.append((sample, generator))
        if self._micro:
            return
        drawn, self._waiting = self._waiting, []
        if self.fake is not None:
            for _ in range(self._score.fake_steps):
                self._fake_step(drawn)
        for sample, generator in drawn:
            self.descend(sample, generator, 1 / len(drawn))
        self.step_student()

    def descend(self, sample: PathSample, generator: RowGenerator, share: float) -> None:
        """Add `share` of the micro-batch's gradient to that of every network that steps with the student."""
        loss = self.distillation_loss(sample, generator)
        (loss.value * share).backward()
        self.last_loss = Loss(loss.value.detach(), loss.logs)

    def distillation_loss(self, sample: PathSample, generator: RowGenerator) -> Loss:
        """The student's distillation loss on the micro-batch, without that of a discriminator; kept for the logs."""
        if self.fake is None:
            loss = self.recipe.distillation(self.student, self.guided, sample, self.global_step)
            self.keep(sample, loss)
            return loss
        sample, num_jumps = self._generated_sample(sample.x1, sample.cond, generator)
        loss = self._score(self.fake, self.guided, sample, self.global_step)
        loss = Loss(loss.value, {**loss.logs, "jumps": torch.tensor(float(num_jumps)), "fake_loss": self._fake_loss})
        self.keep(sample, loss)
        return loss

    @property
    def _score(self) -> ScoreDistillation:
        objective = self.recipe.distillation
        assert isinstance(objective, ScoreDistillation), "only a score distillation has a fake"
        return objective

    def _fake_step(self, drawn: Drawn) -> None:
        """One step of the fake on samples that the student makes from new noise, with the micro-batches' conditions."""
        assert self.fake is not None
        for sample, generator in drawn:
            with torch.no_grad():
                made, _ = self._generated_sample(normal_like(sample.x1, generator), sample.cond, generator)
            loss = self._score.learn(self.fake, made)
            self.keep(made, loss)
            self._fake_loss = loss.value.detach()
            (loss.value / len(drawn)).backward()
        self.step_auxiliary("fake")

    def _generated_sample(self, x1: Tensor, cond: Cond | None, generator: RowGenerator) -> tuple[PathSample, int]:
        """The student's samples from x1 with new noise and the recipe's times; and the number of jumps they took."""
        x0, num_jumps = self._score.samples(self.recipe.sampler, self.student, x1, cond, generator)
        noise = normal_like(x1, generator)
        t, s = self.recipe.times(len(x1), device=x1.device, generator=generator)
        return self.recipe.path.sample(x0, noise, t, s, cond), num_jumps

    def step_auxiliary(self, name: str) -> None:
        """Step the network of that name, at its own learning rate on the student's schedule."""
        place, auxiliary = next((i, one) for i, one in enumerate(self.auxiliaries, 1) if one.name == name)
        optimizer = self.optimizers()[place].optimizer  # torch's own: Lightning does not count its steps
        schedule = self.recipe.optimizer
        lr = schedule.lr_at(self.global_step, self.recipe.trainer.steps)
        optimizer.param_groups[0]["lr"] = self._full_lr[name] * lr / schedule.lr
        self._step(optimizer, auxiliary.parameters, name)

    def step_student(self) -> None:
        found: Any = self.optimizers()  # a list only of several
        self._step(found[0] if isinstance(found, list) else found, trained(self.student))

    def _step(self, optimizer: Any, parameters: list[nn.Parameter], name: str | None = None) -> None:
        """Average the gradients over processes, clip them as the student's, and step.

        name: of an auxiliary network; None for the student, whose gradient's norm a hook checks.
        """
        self._average_gradients(parameters)
        if name is not None:
            norm = norm_of([p.grad for p in parameters if p.grad is not None])
            self._must_be_finite(f"norm of the {name}'s gradient", norm)
        if self.recipe.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.trainer.world_size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = self._mean(torch.cat([grad.flatten() for grad in grads]))
        parts = whole.split([p.numel() for p in parameters])
        for parameter, grad, mean in zip(parameters, grads, parts, strict=True):
            parameter.grad = grad.copy_(mean.view_as(parameter))

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.trainer.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.trainer.world_size
