"""Guidance: a teacher made of two predictions, v = w v_strong + (1 - w) v_weak; w = 1 is the strong one, w > 1 moves away from the weak.

Sources: classifier-free guidance (Ho, Salimans 2022, arXiv:2207.12598), autoguidance (Karras et al. 2024, arXiv:2406.02507).
w is cond["guidance"] (B,), one for each sample; where cond has none it is the field `default`. The key "guidance" never reaches an inner
teacher. Where w is 1 for the whole batch the weak prediction is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap.flow.types import Cond, Teacher, broadcast_time


@dataclass(frozen=True)
class ClassifierFree:
    """v = w v(x, t, cond) + (1 - w) v(x, t, no condition): one teacher, asked with its condition and without.

    Without a condition "class" is -1 and every other key is dropped. Where cond holds nothing but guidance both are the same and one call
    is made.
    """

    teacher: Teacher
    default: float = 1.0

    @property
    def network_calls(self) -> int:
        """Calls of a network for one guided velocity, at most."""
        return 2 * network_calls(self.teacher)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The guided velocity, shaped like x."""
        scale, inner = _split(cond, self.default)
        strong = self.teacher.velocity(x, t, inner)
        if not inner:
            return strong
        return _extrapolate(strong, lambda: self.teacher.velocity(x, t, _without_condition(inner)), scale)


@dataclass(frozen=True)
class Autoguidance:
    """v = w v_strong(x, t, cond) + (1 - w) v_weak(x, t, cond).

    Weak is a smaller or less trained version of strong, with the same condition.
    """

    strong: Teacher
    weak: Teacher
    default: float = 1.0

    @property
    def network_calls(self) -> int:
        """Calls of a network for one guided velocity, at most."""
        return network_calls(self.strong) + network_calls(self.weak)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The guided velocity, shaped like x."""
        scale, inner = _split(cond, self.default)
        strong = self.strong.velocity(x, t, inner)
        return _extrapolate(strong, lambda: self.weak.velocity(x, t, inner), scale)


def network_calls(teacher: Teacher) -> int:
    """How many calls of a network one velocity of this teacher costs, at most: 1 unless it says otherwise."""
    return getattr(teacher, "network_calls", 1)


def _split(cond: Cond | None, default: float) -> tuple[Tensor | float, Cond | None]:
    """The guidance scale, and cond without it (None where nothing is left)."""
    if cond is None:
        return default, None
    inner = {key: value for key, value in cond.items() if key != "guidance"}
    return cond.get("guidance", default), inner or None


def _without_condition(cond: Cond) -> Cond | None:
    """cond with class -1 and no other key; None where there is no class."""
    return {"class": torch.full_like(cond["class"], -1)} if "class" in cond else None


def _extrapolate(strong: Tensor, weak: Callable[[], Tensor], scale: Tensor | float) -> Tensor:
    """w strong + (1 - w) weak in float32 or better, in strong's dtype; weak is not asked where every w is 1."""
    if bool(torch.as_tensor(scale == 1).all()):
        return strong
    dtype = torch.promote_types(strong.dtype, torch.float32)
    w = broadcast_time(torch.as_tensor(scale, dtype=dtype), strong)
    return (w * strong.to(dtype) + (1 - w) * weak().to(dtype)).to(strong.dtype)
