"""Guidance: a teacher from two predictions, v = w v_strong + (1 - w) v_weak.

w = 1 is the strong prediction, w > 1 extrapolates away from the weak one. Sources: classifier-free guidance (Ho,
Salimans 2022, arXiv:2207.12598), autoguidance (Karras et al. 2024, arXiv:2406.02507). w is cond["guidance"] (B,), by
default the field `default`. The key "guidance" is not passed to the inner teachers. If w is 1 for the whole batch,
the weak prediction is not computed; `scales_differ` says that it is not, as in training, so that no device is asked.
IntervalGuidance limits any guidance to an interval of times, and to that of each row, cond["guidance_interval"] (B, 2),
if there is one; it is not passed on either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.flow.types import Cond, Teacher, broadcast_time
from flowmap.teachers.streams import independent, may_overlap, on_two_streams

INTERVAL = "guidance_interval"


@dataclass(frozen=True)
class ClassifierFree:
    """v = w v(x, t, cond) + (1 - w) v(x, t, no condition): one teacher, called with its conditions and without.

    The unconditional call has class -1 and no other key. If cond has no key except guidance, both calls would be the
    same and only one is made. rescale_patch: the side of the patches of x (B, C, H, W) whose v has the norm of the
    conditional velocity.
    """

    teacher: Teacher
    default: float = 1.0
    scales_differ: bool = False
    rescale_patch: int | None = None

    @property
    def network_calls(self) -> int:
        """The maximum number of network calls per guided velocity."""
        return 2 * network_calls(self.teacher)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The guided velocity, shaped like x."""
        scale, inner = _split(cond, self.default)
        if not inner or (not self.scales_differ and _is_one(scale)):
            return self.teacher.velocity(x, t, inner)
        nothing = _without_condition(inner)
        # on a CPU one call takes as long as two, unless the network is tiny
        both = at_once(self.teacher, x, t, inner, nothing) if self.scales_differ and x.device.type != "cpu" else None
        strong, weak = both or (self.teacher.velocity(x, t, inner), self.teacher.velocity(x, t, nothing))
        guided = _mixed(strong, weak, scale)
        return guided if self.rescale_patch is None else _rescaled(guided, strong, self.rescale_patch)


@dataclass(frozen=True)
class Autoguidance:
    """v = w v_strong(x, t, cond) + (1 - w) v_weak(x, t, cond).

    Weak is a smaller or less trained version of strong, with the same conditions. On a CUDA device independent
    networks run at the same time (streams.py).
    """

    strong: Teacher
    weak: Teacher
    default: float = 1.0
    scales_differ: bool = False

    @property
    def network_calls(self) -> int:
        """The maximum number of network calls per guided velocity."""
        return network_calls(self.strong) + network_calls(self.weak)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The guided velocity, shaped like x."""
        scale, inner = _split(cond, self.default)
        strong, weak = (partial(teacher.velocity, x, t, inner) for teacher in (self.strong, self.weak))
        if not self.scales_differ and _is_one(scale):
            return strong()
        if may_overlap(x) and self._independent:
            return _mixed(*on_two_streams(strong, weak, x.device), scale)
        return _mixed(strong(), weak(), scale)

    @cached_property
    def _independent(self) -> bool:
        """Whether both networks can run at once; found in the first call, when they are sharded or compiled if ever."""
        return independent(self.strong, self.weak)


@dataclass(frozen=True)
class IntervalGuidance:
    """The guided teacher at its scale for low <= t <= high, and at scale 1 elsewhere.

    cond["guidance_interval"] (B, 2), if given, limits the scale further: it acts where t is in both intervals.

    Source: limited interval guidance (Kynkaanniemi et al. 2024, arXiv:2404.07724). teacher: reads cond["guidance"], and
    is the unguided one at scale 1. default: the scale where cond has none.
    """

    teacher: Teacher
    low: float
    high: float
    default: float = 1.0

    @property
    def network_calls(self) -> int:
        """The maximum number of network calls per velocity, that inside the interval."""
        return network_calls(self.teacher)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The velocity, shaped like x; t is (B,)."""
        given = {} if cond is None else dict(cond)
        scale, acts = given.get("guidance", torch.full_like(t, self.default)), self.acts(t)
        if (drawn := given.pop(INTERVAL, None)) is not None:
            acts = acts & (t >= drawn[:, 0]) & (t <= drawn[:, 1])
        return self.teacher.velocity(x, t, given | {"guidance": torch.where(acts, scale, 1.0)})

    def acts(self, t: Tensor) -> Tensor:
        """Whether t is in the interval, shaped like t."""
        return (t >= self.low) & (t <= self.high)


@runtime_checkable
class CountsCalls(Protocol):
    """A teacher that states how many network calls one velocity costs."""

    @property
    def network_calls(self) -> int: ...


@runtime_checkable
class JoinsConditions(Protocol):
    """A teacher that can be called on two batches of conditions at once."""

    def joined(self, first: Cond, second: Cond | None, rows: int) -> Cond | None: ...

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor: ...


def at_once(teacher: Teacher, x: Tensor, t: Tensor, first: Cond, second: Cond | None) -> tuple[Tensor, ...] | None:
    """The velocities under two conditions by one call of twice the rows; None if the conditions cannot be joined.

    It has half the kernels of two calls, and gathers sharded weights once.
    """
    joined = teacher.joined(first, second, len(x)) if isinstance(teacher, JoinsConditions) else None
    if joined is None:
        return None
    return teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), joined).chunk(2)


def network_calls(teacher: object) -> int:
    """The maximum number of network calls per velocity of the teacher; 1 unless it states another number."""
    return teacher.network_calls if isinstance(teacher, CountsCalls) else 1


def calls_at(teacher: object, t: float) -> int:
    """The number of network calls per velocity at time t: at most `network_calls`, fewer outside an interval."""
    if not isinstance(teacher, IntervalGuidance) or bool(teacher.acts(torch.tensor(t))):
        return network_calls(teacher)
    guided = teacher.teacher
    if isinstance(guided, Autoguidance):
        return network_calls(guided.strong)
    return network_calls(guided.teacher if isinstance(guided, ClassifierFree) else guided)


def _split(cond: Cond | None, default: float) -> tuple[Tensor | float, Cond | None]:
    """The guidance scale, and cond without it (None if no other key is left)."""
    if cond is None:
        return default, None
    inner = {key: value for key, value in cond.items() if key not in ("guidance", INTERVAL)}
    return cond.get("guidance", default), inner or None


def _without_condition(cond: Cond) -> Cond | None:
    """cond with class -1 and no other key; None if it has no class."""
    return {"class": torch.full_like(cond["class"], -1)} if "class" in cond else None


def _is_one(scale: Tensor | float) -> bool:
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


def _mixed(strong: Tensor, weak: Tensor, scale: Tensor | float) -> Tensor:
    """w strong + (1 - w) weak, computed in float32 or better."""
    dtype = torch.promote_types(strong.dtype, torch.float32)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dtype, device=strong.device)
    w = broadcast_time(scale.to(dtype), strong)
    return (w * strong.to(dtype) + (1 - w) * weak.to(dtype)).to(strong.dtype)


def _rescaled(guided: Tensor, strong: Tensor, patch: int) -> Tensor:
    """guided (B, C, H, W), each patch scaled to the norm of strong's; a patch of zeros stays."""
    ours, theirs = (F.pixel_unshuffle(v, patch).norm(dim=1, keepdim=True) for v in (guided, strong))
    ratio = theirs / ours.clamp_min(torch.finfo(ours.dtype).tiny)
    return guided * F.interpolate(ratio, scale_factor=patch, mode="nearest")


def with_drawn_scales(teacher: Teacher, scale: tuple[float, float]) -> Teacher:
    """The teacher for a batch with guidance scales drawn from that range: it does not ask whether all are 1."""
    if isinstance(teacher, IntervalGuidance):
        return replace(teacher, teacher=with_drawn_scales(teacher.teacher, scale))
    if isinstance(teacher, (ClassifierFree, Autoguidance)) and scale != (1.0, 1.0):
        return replace(teacher, scales_differ=True)
    return teacher
