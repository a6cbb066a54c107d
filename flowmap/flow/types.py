"""The shared types: path samples, losses, and the protocols of teachers, students, paths, priors and so on.

Clock, everywhere: t = 0 is data, t = 1 is noise; t is the departure, s the arrival, 0 <= s <= t <= 1.
Letters: x0 data, x1 noise, xt the point at t, vt the conditional velocity d xt / dt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.flow.draws import Generator
from flowmap.flow.host import Rows

Cond = Mapping[str, Tensor]
"""Conditions by name, one row per sample: "class" (B,) int64 with -1 for no class, "guidance" (B,) float, "text" ..."""


@dataclass(frozen=True)
class PathSample:
    """All randomness of a training step, drawn before an objective sees it.

    x0, x1, xt, vt are (B, ...); t and s are (B,) with 0 <= s <= t <= 1, in float32 or better. variance: that of the
    entries of x1 given the code of a learned prior, (B, ...); None means 1. place: the index of each sample in the run,
    (B,) int64 on the CPU; None outside a run. still: on the CPU, the samples whose times were drawn with s = t; None
    if that is not known. What is on the CPU decides which rows a network is called on, without waiting for the device.
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    s: Tensor
    xt: Tensor
    vt: Tensor
    cond: Cond | None = None
    variance: Tensor | None = None
    place: Tensor | None = None
    still: Tensor | None = None

    def places(self, step: int) -> Tensor:
        """`place`; without one, the indices in a run with one batch of this size per step. On the CPU."""
        if self.place is not None:
            return self.place
        return step * len(self.t) + torch.arange(len(self.t))

    @property
    def moving(self) -> Tensor:
        """The samples with t > s, a mask (B,) on the CPU; the device is asked only if the draw does not know them."""
        if self.still is None or self.t.device.type == "cpu":
            return (self.t > self.s).cpu()
        return ~self.still


def rows_of(sample: PathSample, rows: Rows | Tensor) -> PathSample:
    """The sample restricted to those rows; a tensor is an index of the CPU."""
    host, places = (rows.host, rows.places) if isinstance(rows, Rows) else (rows, rows)
    cond = None if sample.cond is None else {key: value[places] for key, value in sample.cond.items()}
    parts = {name: getattr(sample, name)[places] for name in ("x0", "x1", "t", "s", "xt", "vt")}
    more: dict[str, Any] = {"variance": None if sample.variance is None else sample.variance[places]}
    for name in ("place", "still"):
        more[name] = None if (value := getattr(sample, name)) is None else value[host]
    return PathSample(**parts, cond=cond, **more)


@dataclass(frozen=True)
class Loss:
    """The value to minimise, and quantities to log.

    value is a scalar with a graph. logs are detached: a scalar is logged as train/<key>; a (B,) vector is also logged
    by bins of t.
    """

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """A frozen velocity field v(x, t) = E[x1 - x0 | xt = x] on our clock; it never needs gradients."""

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor: ...


class FlowMap(Protocol):
    """A student: f(x, t, s) = x + (s - t) F(x, t, s), with F the mean velocity over [s, t]."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor: ...

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor: ...


class Path(Protocol):
    """An interpolation of data and noise: xt = a(t) x0 + b(t) x1."""

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> PathSample: ...


class TimeSampler(Protocol):
    """Draws n pairs (t, s), each (n,) float32 on `device`, 0 <= s <= t <= 1."""

    def __call__(
        self, n: int, *, device: torch.device | str = "cpu", generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...


class Prior(Protocol):
    """Where a path starts: x1, shaped like x0; a learned prior may depend on x0 and cond.

    learned: x1 comes from networks of its own, not from N(0, I).
    """

    @property
    def learned(self) -> bool: ...

    def check(self, recipe: RecipeView) -> None: ...

    def sample(self, x0: Tensor, cond: Cond | None, generator: Generator | None) -> Tensor: ...


class Coupling(Protocol):
    """How noise and data are joined.

    independent: noise is drawn from the recipe's prior, whatever the data. paired: a teacher's ODE joined each noise to
    a sample.
    """

    @property
    def independent(self) -> bool: ...

    @property
    def paired(self) -> bool: ...

    def check(self, recipe: RecipeView) -> None: ...


class Objective(Protocol):
    """A deterministic function of student, teacher and a drawn sample; step is the optimizer step (for warm-ups).

    diagonal        it trains a plain velocity, t = s alone, so that the student needs no arrival time
    artifact        what a run writes to student/: "student", "autoencoder", "text_autoencoder", "text_joint" or "prior"
    derivative      how it differentiates the network ("dual", "forward", "difference"), None where it does not
    learns_weight   its error is weighted by a branch of the student, log_error(t, s)
    draws_samples   it trains on samples that the student draws
    sees_pictures   it compares pictures, so latents are decoded first
    loss_net        the perceptual network that compares them, which no metric may use
    null_weight     the weight, in its target, of the student's prediction without a condition
    distillation    the objective that compares student and teacher: itself, or the one that it adds a loss to
    matching        what matches the law of the student's samples (objectives/joint.py, score_distillation.py), or None

    A class that lacks one of these members gets the default of flow/parts.py when a recipe is read. Only `__call__` is
    required.
    """

    artifact: ClassVar[str]

    @property
    def diagonal(self) -> bool: ...

    @property
    def derivative(self) -> str | None: ...

    @property
    def learns_weight(self) -> bool: ...

    @property
    def draws_samples(self) -> bool: ...

    @property
    def sees_pictures(self) -> bool: ...

    @property
    def loss_net(self) -> str | None: ...

    @property
    def null_weight(self) -> float: ...

    @property
    def distillation(self) -> Objective: ...

    @property
    def matching(self) -> Any: ...

    def check(self, recipe: RecipeView) -> None: ...

    def __call__(self, student: FlowMap, teacher: Teacher | None, sample: PathSample, step: int) -> Loss: ...


class Sampler(Protocol):
    """Takes x1 to data in a few calls of the student.

    steps: the step counts that evaluation reports. calls(steps): the number of calls of the student for that count.
    jumps_to_data: every call of the student goes to t = 0. draws: it may use `generator`, which is None otherwise. A
    subclass of samplers/grids.py's FewStep has all members but `__call__`.
    """

    @property
    def steps(self) -> tuple[int, ...]: ...

    @property
    def jumps_to_data(self) -> bool: ...

    @property
    def draws(self) -> bool: ...

    def times(self, steps: int) -> tuple[float, ...]:
        """The steps + 1 times of a run, falling to exactly 0."""
        ...

    def calls(self, steps: int) -> int:
        """How often a run calls the student."""
        ...

    def start(self, x1: Tensor) -> Tensor:
        """The state at the first of the times."""
        ...

    def step(self, student: FlowMap, x: Tensor, t: float, s: float, cond: Cond | None) -> Tensor:
        """The state x at time t carried to time s in one step."""
        ...

    def check(self, recipe: RecipeView) -> None: ...

    def __call__(
        self, student: FlowMap, x1: Tensor, cond: Cond | None = None, *, steps: int, generator: Generator | None = None
    ) -> Tensor: ...


class DataView(Protocol):
    """What a part reads of a recipe's data. autoencoder: what decodes its latents, None where nothing does."""

    @property
    def in_pixels(self) -> bool: ...

    @property
    def conditional(self) -> bool: ...

    @property
    def autoencoder(self) -> object | None: ...


class MetricView(Protocol):
    """What a part reads of a metric.

    normal_noise: it expects noise of N(0, I). feature_space: the network in whose features it compares, None if none.
    """

    @property
    def normal_noise(self) -> bool: ...

    @property
    def feature_space(self) -> str | None: ...


class TeacherView(Protocol):
    """What a part reads of a recipe's teacher."""

    @property
    def guidance(self) -> object | None: ...


class TrainerView(Protocol):
    """What a part reads of a recipe's trainer."""

    @property
    def strategy(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def teacher_precision(self) -> str: ...

    @property
    def frozen_precision(self) -> str: ...


class RecipeView(Protocol):
    """What a part reads of the recipe that it belongs to, in `check`.

    artifact, distillation: those of `objective`. key: the key of `distillation`, "objective" or "objective.base".
    """

    @property
    def data(self) -> DataView: ...

    @property
    def artifact(self) -> str: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def distillation(self) -> Objective: ...

    @property
    def key(self) -> str: ...

    @property
    def teacher(self) -> TeacherView | None: ...

    @property
    def path(self) -> Path: ...

    @property
    def prior(self) -> Prior: ...

    @property
    def coupling(self) -> Coupling: ...

    @property
    def sampler(self) -> Sampler: ...

    @property
    def metrics(self) -> Sequence[MetricView]: ...

    @property
    def trainer(self) -> TrainerView: ...


def broadcast_time(t: Tensor | float, x: Tensor) -> Tensor:
    """t reshaped to broadcast against x: (B,) becomes (B, 1, ..., 1); a number becomes a 0-dim tensor.

    The dtype of t does not change, so times stay in float32 or better. Raises a ValueError unless t is a scalar or
    (B,).
    """
    # not as_tensor of a number, which copies it to the device and waits
    t = torch.as_tensor(t, device=x.device) if isinstance(t, Tensor) else torch.full((), t, device=x.device)
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"times must be ({x.shape[0]},) for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))
