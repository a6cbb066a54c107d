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
from flowmap.flow.types import Cond, FlowMap, Loss, PathSample
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives.matching import OfJump, Samples, Term
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


def fake_score(recipe: Recipe, term: Term, net: FlowMapNet) -> Auxiliary:
    """The fake score network of a distribution-matching term (objectives/reverse_kl.py)."""
    lr = term.fake_lr or recipe.optimizer.lr

    def optimizer() -> torch.optim.Optimizer:
        built = recipe.optimizer(trained(net))
        built.param_groups[0]["lr"] = lr
        return built

    return Auxiliary("fake", net, optimizer)


class AuxiliaryModule(DistillModule):
    """A DistillModule that also trains on the student's samples, with a fake score network, if one is given.

    The micro-batches of a step are kept until the last one. Then the fake takes its own steps on all of them, and after
    that the student takes its step, so that a step is one of the whole batch for both.
    """

    fake: FlowMapNet | None

    def __init__(self, *parts: Any, fake: FlowMapNet | None = None, **more: Any):
        super().__init__(*parts, **more)
        self.automatic_optimization = False
        self.matching = self.recipe.objective.matching
        self.auxiliaries: tuple[Auxiliary, ...] = ()
        if fake is not None:
            self.auxiliaries = (fake_score(self.recipe, self.matching.term, fake),)
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
        if self.fake is not None and self._matching_weight > 0:
            for _ in range(self.matching.term.fake_steps):
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
        """The student's loss on the micro-batch, without that of a discriminator; kept for the logs."""
        objective, matching = self.recipe.distillation, self.matching
        if matching is objective:  # there is no other loss
            sample, loss = self._matching_loss(sample, generator)
            self.keep(sample, loss)
            return loss
        loss = objective(self.student, self.guided, sample, self.global_step)
        self.keep(sample, loss)
        if (weight := self._matching_weight) > 0:
            _, term = self._matching_loss(sample, generator)
            self._must_be_finite("term's loss", term.value.detach())
            logs = {f"term_{key}": value.mean() for key, value in term.logs.items()}
            logs |= {"term_loss": term.value.detach(), "term_weight": torch.tensor(weight)}
            loss = Loss(loss.value + weight * term.value, {**loss.logs, **logs})
        return loss

    @property
    def _matching_weight(self) -> float:
        return 0.0 if self.matching is None else self.matching.weight_at(self.global_step)

    def _matching_loss(self, sample: PathSample, generator: RowGenerator) -> tuple[PathSample, Loss]:
        """The student's samples from the noise of a micro-batch, and the loss of the distribution-matching term."""
        made, samples = self._generated_sample(sample.x1, sample.cond, generator)
        network = self.student if self.fake is None else self._fake_of(samples)
        loss = self.matching.term(network, self.guided, made, self.global_step)
        logs = {} if self.fake is None else {"fake_loss": self._fake_loss}
        return made, Loss(loss.value, {**loss.logs, "jumps": torch.tensor(float(samples.jumps)), **logs})

    def _fake_step(self, drawn: Drawn) -> None:
        """One step of the fake on samples that the student makes from new noise, with the micro-batches' conditions."""
        assert self.fake is not None
        for sample, generator in drawn:
            with torch.no_grad():
                made, samples = self._generated_sample(normal_like(sample.x1, generator), sample.cond, generator)
            loss = self.matching.term.learn(self._fake_of(samples), made)
            self.keep(made, loss)
            self._fake_loss = loss.value.detach()
            (loss.value / len(drawn)).backward()
        self.step_auxiliary("fake")

    def _fake_of(self, samples: Samples) -> FlowMap:
        assert self.fake is not None
        return OfJump(self.fake, samples.departure) if self.matching.term.by_jump else self.fake

    def _generated_sample(self, x1: Tensor, cond: Cond | None, generator: RowGenerator) -> tuple[PathSample, Samples]:
        """The student's samples from x1, with new noise and times, and what they are."""
        made = self.matching.samples(self.recipe.sampler, self.student, x1, cond, generator)
        noise = normal_like(x1, generator)
        times = self.matching.times_of(self.recipe.times)
        t, s = times(len(x1), device=x1.device, generator=generator)
        return self.recipe.path.sample(made.x0, noise, t, s, cond), made

    def step_auxiliary(self, name: str) -> None:
        """Step the network of that name, at its own learning rate on the student's schedule."""
        place, auxiliary = next((i, one) for i, one in enumerate(self.auxiliaries, 1) if one.name == name)
        optimizer = self._optimizer(place).optimizer  # torch's own: Lightning does not count its steps
        schedule = self.recipe.optimizer
        lr = schedule.lr_at(self.global_step, self.recipe.trainer.steps)
        optimizer.param_groups[0]["lr"] = self._full_lr[name] * lr / schedule.lr
        self._step(optimizer, auxiliary.parameters, name)

    def step_student(self) -> None:
        self._step(self._optimizer(0), trained(self.student))

    def _optimizer(self, place: int) -> Any:
        found = self.optimizers()  # Lightning gives a single one without a list
        return found[place] if isinstance(found, list) else found

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
