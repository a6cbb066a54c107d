"""A teacher with clipped or thresholded predicted data, after guidance, as its pipeline's sampler does it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowmap.flow.limit import Limit, limited
from flowmap.flow.types import Cond, Teacher
from flowmap.teachers.guidance import network_calls


@dataclass(frozen=True)
class Limited:
    """The velocity towards limit(x0), with x0 = x - t v the (guided) teacher's prediction.

    first and last: see flow.limit.limited.
    """

    teacher: Teacher
    limit: Limit
    first: float = 1e-4
    last: float = 1.0

    @property
    def network_calls(self) -> int:
        return network_calls(self.teacher)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return limited(self.teacher.velocity(x, t, cond), x, t, self.limit, first=self.first, last=self.last)
