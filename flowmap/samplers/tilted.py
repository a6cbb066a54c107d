"""Sampling by a reward, without training: samples of the tilted law p(x0) exp(scale r(x0)) / Z, with p the student's.

Sequential Monte Carlo over the noise of a sampler (Del Moral, Doucet, Jasra 2006, J. R. Statist. Soc. B 68(3)). The
flow map looks ahead: z_k = f(x_k, t_k, 0) says where a state ends, so that its reward is known before the last step, as
in Diamond Maps (arXiv:2602.05993); no code or formula of theirs is used. Clock: 0 data, 1 noise.

    x_0 = t_max e_0,   x_{k+1} = (1-s)/(1-s~) f(x_k, t_k, s~) + gamma s e_{k+1}      gamma-sampling, e_k ~ N(0, I)
    pi_k (e_0 .. e_k)  ~  prod N(e_j) exp(scale (k+1)/K r(z_k))                      tilted more with each of K steps

Between pi_{k-1} and pi_k particles are weighted by the ratio of the exponentials and resampled. A move changes e_k
alone and leaves pi_k as it is: preconditioned Crank-Nicolson Langevin with the gradient of the reward through the jump
(Cotter, Roberts, Stuart, White 2013, arXiv:1202.0709), and a Metropolis test. The last pi is the tilted law for any
gamma, so that there is no error but that of n particles, O(1/n). At one step moves remove that too.

With `move: ascent` a move is e <- |e| u / |u| with u = e + move_size grad(scale r) instead, without noise or test: no
tilted law, but the reward rises further in as many calls, and each sample stays near where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from flowmap.base.ranges import FromZero, Range, Share
from flowmap.flow.draws import Generator, normal_like
from flowmap.flow.reward import LOST, Reward, effective, resampled, rewards_of, uniform_rows
from flowmap.flow.types import Cond, FlowMap, RecipeView, broadcast_time
from flowmap.samplers.grids import FewStep, jump

CHOICES = ("weighted", "best")
MOVES = ("langevin", "ascent")


@dataclass(frozen=True)
class Tilted(FewStep):
    """Each sample is one of `particles` of its own, chosen by its reward.

    reward      r(x, cond) (B,)
    scale       of the reward in the exponent
    particles   n, for each sample; 1 with moves is gradient guidance, whose law is the tilted one at one step only
    moves       moves of each particle by the gradient at each step; of the chosen one at the last step
    move        "langevin": a move leaves the tilted law as it is; "ascent": a move along the gradient on the sphere of
                the noise's norm, for a higher reward and no law
    move_size   of a move, in (0, 2]. langevin: at 2 its proposal forgets where it was, small ones are accepted more
                often. ascent: the factor of the gradient of scale r
    gamma       the noise between steps. At 1 the look-ahead is the step itself, and costs no call
    resample    particles are resampled where their effective number is below this share of them. At 0, without moves,
                only ends are weighted and nothing is looked ahead
    choice      "weighted": the sample is drawn by the weights; "best": it has the highest reward, which is no tilted
                law. With resample 0 this is best of n
    """

    reward: Reward = field(kw_only=True)
    scale: FromZero = 1.0
    particles: Annotated[int, Range(1, 4096)] = 8
    moves: Annotated[int, Range(0, 1000)] = 0
    move: str = "langevin"
    move_size: Annotated[float, Range(0, 2, above=True)] = 1.0
    gamma: Share = 1.0
    resample: Share = 0.5
    choice: str = "weighted"

    def __post_init__(self):
        super().__post_init__()
        if self.choice not in CHOICES:
            raise ValueError(f"choice: {self.choice!r} is not one of {', '.join(CHOICES)}")
        if self.move not in MOVES:
            raise ValueError(f"move: {self.move!r} is not one of {', '.join(MOVES)}")

    @property
    def draws(self) -> bool:
        return True

    @property
    def jumps_to_data(self) -> bool:
        return self.gamma == 1

    def check(self, recipe: RecipeView) -> None:
        if recipe.prior.learned:
            raise ValueError("sampler: tilted weighs noise from N(0, I), and the prior is a learned one")
        if not recipe.data.in_pixels:
            what = "a recipe's tilted sampler rewards samples as they are, and these are latents"
            raise ValueError(f"sampler: {what}; give student.sample(..., reward=...) instead")

    def calls(self, steps: int) -> int:
        """Calls of the student for a sample. Those of moves, and looks before them, have a backward pass too."""
        n, between = self.particles, steps - 1
        looks = n * (steps if self._looks else 1)
        jumps = n * between * (self.gamma < 1 or not self._looks)
        noisy = between if self.gamma else min(between, 1)  # steps with noise to move, the last apart
        return looks + jumps + self.moves * (n * noisy + (self.gamma > 0 or steps == 1))

    @property
    def _looks(self) -> bool:
        """Whether particles are compared or moved before the last step."""
        return self.moves > 0 or (self.particles > 1 and self.resample > 0)

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor:
        """x0, shaped like x1, after calls(steps) calls of the student for each sample. Raises ValueError for steps < 1,
        or for moves by a reward without a gradient.
        """
        times, rows, n = self.times(steps), len(x1), self.particles
        others = normal_like(x1[:, None].expand(rows, n - 1, *x1.shape[1:]), generator)
        noise = torch.cat([x1[:, None], others], 1).flatten(0, 1)
        wide = None if cond is None else {key: value.repeat_interleave(n, 0) for key, value in cond.items()}
        step = _Step(self, student, torch.zeros_like(noise), times[0], times[0], 1 / steps, wide)
        log_weights = before = torch.zeros(rows, n, dtype=torch.float64, device=x1.device)
        for k, s in enumerate(times[1:-1], 2):
            end = None
            if self._looks:
                at = step.look(noise)
                log_weights = log_weights + at.value.view(rows, n) - before
                places, log_weights = self._resampled(log_weights, generator)
                step = step.at(places)
                at = step.moved(at.at(places), rows, generator)
                noise, end, before = at.noise, at.end, at.value.view(rows, n)
            step = step.next(noise, end, s, k / steps)
            noise = normal_like(noise.unflatten(0, (rows, n)), generator).flatten(0, 1)
        at = step.look(noise)
        log_weights = log_weights + at.value.view(rows, n) - before
        chosen = self._chosen(log_weights, at.value.view(rows, n), generator)
        return step.at(chosen).moved(at.at(chosen), rows, generator).end

    def _resampled(self, log_weights: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The particles that go on, as places (B n,) among all, and their log weights (B, n)."""
        rows, n = log_weights.shape
        draw = uniform_rows(rows, 1, log_weights.device, generator)
        few = (effective(log_weights) < self.resample * n)[:, None]
        own = torch.arange(n, device=log_weights.device).expand(rows, n)
        places = torch.where(few, resampled(log_weights, draw, n), own)
        return _among_all(places, n), torch.where(few, 0.0, log_weights)

    def _chosen(self, log_weights: Tensor, values: Tensor, generator: Generator | None) -> Tensor:
        """One particle of each row, as places (B,) among all."""
        draw = uniform_rows(len(values), 1, values.device, generator)
        best = values.argmax(1, keepdim=True)
        return _among_all(best if self.choice == "best" else resampled(log_weights, draw, 1), values.shape[1])


def _among_all(places: Tensor, n: int) -> Tensor:
    """Places (B, m) in rows of n as places (B m,) among all."""
    return (places + n * torch.arange(len(places), device=places.device)[:, None]).flatten()


class _Particles(NamedTuple):
    """Noise (P, ...), where it ends, scale r there (P,), and its gradient in the noise if there are moves."""

    noise: Tensor
    end: Tensor
    value: Tensor
    gradient: Tensor | None

    def at(self, places: Tensor) -> _Particles:
        gradient = None if self.gradient is None else self.gradient[places]
        return _Particles(self.noise[places], self.end[places], self.value[places], gradient)


@dataclass(frozen=True)
class _Step:
    """A step of P particles from their states mean + sigma noise at time t; share: of the scale, 1 at the last step."""

    settings: Tilted
    student: FlowMap
    mean: Tensor
    sigma: float
    t: float
    share: float
    cond: Cond | None

    def at(self, places: Tensor) -> _Step:
        """The same for the particles at those places."""
        cond = None if self.cond is None else {key: value[places] for key, value in self.cond.items()}
        return replace(self, mean=self.mean[places], cond=cond)

    def look(self, noise: Tensor, *, last: bool = False) -> _Particles:
        """Where particles end, and what that is worth; last: no move follows, so that no gradient is needed."""
        with torch.set_grad_enabled(self.settings.moves > 0 and self.sigma > 0 and not last):
            free = noise.detach().requires_grad_(torch.is_grad_enabled())
            end = jump(self.student, self.mean + self.sigma * free, self.t, 0.0, self.cond)
            value = self.settings.scale * self.share * rewards_of(self.settings.reward, self.student, end, self.cond)
            gradient = None
            if torch.is_grad_enabled():
                if not value.requires_grad:
                    raise ValueError("moves: this reward has no gradient; set moves to 0")
                (gradient,) = torch.autograd.grad(value.sum(), free)
        found = value.detach().double()
        return _Particles(noise, end.detach(), torch.where(found.isfinite(), found, LOST), gradient)

    def moved(self, at: _Particles, rows: int, generator: Generator | None) -> _Particles:
        """The particles of `rows` samples after their moves."""
        moves = self.settings.moves if self.sigma > 0 else 0
        for left in reversed(range(moves)):
            at = (
                self._ascended(at, last=left == 0)
                if self.settings.move == "ascent"
                else self._move(at, rows, generator)
            )
        return at

    def _ascended(self, at: _Particles, *, last: bool) -> _Particles:
        """The particles after a step along the gradient that keeps the norm of each one's noise."""
        assert at.gradient is not None
        norm = lambda e: broadcast_time(e.flatten(1).norm(dim=1), e)
        uphill = at.noise + self.settings.move_size * at.gradient
        return self.look(uphill * (norm(at.noise) / norm(uphill)), last=last)

    def _move(self, at: _Particles, rows: int, generator: Generator | None) -> _Particles:
        d, shape = self.settings.move_size, (rows, len(at.noise) // rows)
        assert at.gradient is not None
        fresh = normal_like(at.noise.unflatten(0, shape), generator).flatten(0, 1)
        proposal = ((2 - d) * at.noise + 2 * d * at.gradient + math.sqrt(8 * d) * fresh) / (2 + d)
        new = self.look(proposal)
        odds = _odds(at, new, d) - _odds(new, at, d)
        taken = uniform_rows(*shape, odds.device, generator).flatten().log() < odds
        return _Particles(
            *(torch.where(broadcast_time(taken, one), one, old) for one, old in zip(new, at, strict=True))  # type: ignore[arg-type]
        )

    def next(self, noise: Tensor, end: Tensor | None, s: float, share: float) -> _Step:
        """The step from time s. end: where the particles end, if that is known."""
        gamma = self.settings.gamma
        kept = math.sqrt(1 - gamma**2)
        ratio = 1 - (1 - kept) * s  # as in gamma.py
        if end is None or gamma < 1:
            end = jump(self.student, self.mean + self.sigma * noise, self.t, kept * s / ratio, self.cond)
        return replace(self, mean=ratio * end, sigma=gamma * s, t=s, share=share)


def _odds(at: _Particles, to: _Particles, d: float) -> Tensor:
    """rho(u, v) of Cotter et al. for the potential -scale r: (P,) in float64."""
    assert at.gradient is not None
    u, v, g = (one.double().flatten(1) for one in (at.noise, to.noise, at.gradient))
    return -at.value - (g * (v - u)).sum(1) / 2 - d / 4 * (g * (u + v)).sum(1) + d / 4 * g.square().sum(1)
