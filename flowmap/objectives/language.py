"""Training a text autoencoder: its latents decode to the sentence, and their posterior stays near a Gaussian.

Source: the evidence lower bound (Kingma, Welling 2013, arXiv:1312.6114) with annealing (Bowman et al. 2015,
arXiv:1511.06349) and free bits (Kingma et al. 2016, arXiv:1606.04934). Joint training with a flow: Language Rectified
Flow, arXiv:2403.16995.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import CountFromZero, FromZero, Share, check_ranges
from flowmap.flow.barrier import barrier, barrier_weight
from flowmap.flow.draws import RowGenerator, normal_like
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import Cond, Loss, PathSample, RecipeView, Teacher, broadcast_time

IGNORED = -100


class TextNet(Protocol):
    """A text autoencoder. moments: mean and log-variance of the latents of rows; logits: of each next token, with the
    targets.
    """

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def logits(self, z: Tensor, rows: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class TextStudent(Protocol):
    @property
    def net(self) -> TextNet: ...


class JointStudent(TextStudent, Protocol):
    """A text autoencoder that is also a flow in its own latents."""

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class TextELBO(BaseObjective):
    """(- log p(x | z) + beta KL) / tokens, beta = kl * min(1, step / anneal_steps), KL = sum_d max(mean_B KL_d,
    free_bits).

    Sums are over the tokens of a sentence and the entries of its latent, means over the batch. free_bits is in nats per
    entry. z is drawn from the posterior, and a share word_dropout of the decoder's inputs is masked; both draws are
    functions of the sample's noise x1. The student's network is a text autoencoder (moments, logits). Times and teacher
    are not used.
    """

    kl: FromZero = 1.0
    free_bits: FromZero = 0.1
    anneal_steps: CountFromZero = 1000
    word_dropout: Share = 0.0
    diagonal: ClassVar[bool] = True
    artifact: ClassVar[str] = "text_autoencoder"

    def __post_init__(self):
        check_ranges(self)

    def beta(self, step: int) -> float:
        return self.kl * min(1.0, step / self.anneal_steps) if self.anneal_steps else self.kl

    def __call__(self, student: TextStudent, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        mean, logvar = student.net.moments(sample.x0)
        generator = named_by_noise("elbo", sample.x1)
        z = mean + (logvar / 2).exp() * normal_like(mean, generator)
        dropped = generator.uniform(tuple(sample.x0.shape[1:])) < self.word_dropout
        logits, targets = student.net.logits(z, sample.x0, dropped if self.word_dropout else None)
        counted = targets != IGNORED
        tokens = counted.sum(1)
        nll = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
        kl, bounded = divergence(mean, logvar, self.free_bits)
        value = (nll.mean() + self.beta(step) * bounded) / tokens.float().mean()
        right = ((logits.argmax(-1) == targets) & counted).sum(1) / tokens
        logs = {
            "nll_per_token": (nll.sum() / tokens.sum()).detach(),
            "kl": kl.detach(),
            "accuracy": right.mean().detach(),
        }
        return Loss(value, logs | {"beta": torch.tensor(self.beta(step))})


class TextELBOSpec(Protocol):
    """The objective that reconstructs: `text_elbo`."""

    def __call__(self, student: TextStudent, teacher: Teacher | None, sample: PathSample, step: int) -> Loss: ...


@dataclass(frozen=True)
class TextJoint(BaseObjective):
    """f + lambda g: reconstruction g (`elbo`) and the flow f between noise and the posterior's means, by
    flow/barrier.py.

    f = mean (v(zt, t) - (x1 - z))^2, with z the means less their batch mean, divided by their spread, so that no
    shrinking of latents lowers f. lambda carries no gradient: the gradient of all weights is grad f + lambda grad g,
    with which in small plain steps g falls at least at the rate min(alpha (g - least), beta |grad g|^2). least: the g,
    in nats per token, that is good enough. Each process computes the lambda of its own batch.
    """

    elbo: TextELBOSpec = TextELBO()
    least: FromZero = 0.0
    alpha: FromZero = 1.0
    beta: FromZero = 1.0
    diagonal: ClassVar[bool] = True
    artifact: ClassVar[str] = "text_joint"

    def __post_init__(self):
        check_ranges(self)

    def check(self, recipe: RecipeView) -> None:
        if recipe.trainer.strategy == "fsdp":
            what = "weights of two losses that are differentiated separately"
            raise ValueError(f"trainer.strategy: 'fsdp' cannot shard {what}; use ddp")

    def __call__(self, student: JointStudent, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        first, flow = self.elbo(student, teacher, sample, step), self.flow(student, sample)
        weights = [p for p in student.parameters() if p.requires_grad]
        of_first, of_flow = (
            torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
            for value in (first.value, flow)
        )
        weight = barrier_weight(
            of_first, of_flow, barrier(of_first, self.least, first.value.detach(), alpha=self.alpha, beta=self.beta)
        )
        logs = {"reconstruction": first.value.detach(), "flow": flow.detach(), "weight": weight}
        return Loss(flow + weight * first.value, {**first.logs, **logs})

    def flow(self, student: JointStudent, sample: PathSample) -> Tensor:
        """f; its noise is a function of the sample's x1."""
        means = student.net.moments(sample.x0)[0]
        z = normalised(means)
        x1 = normal_like(z, named_by_noise("flow", sample.x1))
        t = broadcast_time(sample.t, z)
        velocity = student.velocity(((1 - t) * z + t * x1).to(z.dtype), sample.t, sample.cond)
        return (velocity - (x1 - z)).float().square().mean()


def named_by_noise(name: str, x1: Tensor) -> RowGenerator:
    """A generator of more draws for samples with noise x1 (B, ...): each row is named by the bits of two of its
    entries.
    """
    bits = x1.flatten(1)[:, [0, -1]].float().contiguous().view(torch.int32).long()
    return RowGenerator(name, bits[:, 0] << 32 | bits[:, 1] & 0xFFFFFFFF)


def normalised(means: Tensor) -> Tensor:
    """Latents (B, ...) less their batch mean, divided by the spread of all entries, as a saved autoencoder normalises
    its own.
    """
    centred = means - means.mean(0)
    return centred / centred.square().mean().sqrt().clamp_min(1e-6)


def divergence(mean: Tensor, logvar: Tensor, free_bits: float) -> tuple[Tensor, Tensor]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of a batch (B, ...) in nats, without and with free bits.

    Both are sums over entries of the batch mean. In the second no entry is below free_bits, where its gradient
    vanishes.
    """
    each = ((mean.float().square() + logvar.float().exp() - 1 - logvar.float()) / 2).flatten(1).mean(0)
    return each.sum(), each.clamp_min(free_bits).sum()
