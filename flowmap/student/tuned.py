"""Settings of a student for one number of steps, as `flowmap tune` finds them: guidance scale, gamma and time grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flowmap.base.ranges import Calls, FromZero, Share, check_ranges
from flowmap.flow.types import Sampler
from flowmap.samplers import Deterministic, Gamma
from flowmap.samplers.grids import FewStep


@dataclass(frozen=True)
class Tuned:
    """What replaces a student's own settings in a call of `steps` steps that does not give them.

    guidance: the scale, None where it is the student's default. middle: the steps - 1 times between t_max and 0.
    """

    steps: Calls
    guidance: FromZero | None = None
    gamma: Share = 0.0
    middle: tuple[Share, ...] = ()

    def __post_init__(self):
        check_ranges(self)
        if len(self.middle) != self.steps - 1:
            raise ValueError(f"middle: {self.middle} must be {self.steps - 1} times, one less than the steps")

    def sampler(self, base: Sampler) -> Deterministic | Gamma:
        """The sampler of these settings; what they do not name is that of `base`. ValueError for another kind."""
        if not can_be_tuned(base):
            raise ValueError(f"sampler: {type(base).__name__} cannot be tuned; what can: deterministic, gamma")
        grid: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(FewStep)}
        grid["middle"] = self.middle or grid["middle"]
        return Gamma(gamma=self.gamma, **grid) if self.gamma else Deterministic(**grid)


def can_be_tuned(sampler: Sampler) -> bool:
    """Whether it is one of the samplers that apply the map on a grid, with or without noise between steps."""
    return type(sampler) in (Deterministic, Gamma)


def tuned_json(tuned: tuple[Tuned, ...]) -> dict[str, Any]:
    """The settings as config.json has them: {"2": {"guidance": ..., "gamma": ..., "middle": [...]}, ...}."""
    return {str(one.steps): {"guidance": one.guidance, "gamma": one.gamma, "middle": list(one.middle)} for one in tuned}


def tuned_rows(plain: Any) -> list[dict[str, Any]]:
    """The same as rows with their steps. ValueError where it is not such a mapping."""
    if not isinstance(plain, Mapping) or not all(
        key.isdecimal() and isinstance(one, Mapping) for key, one in plain.items()
    ):
        raise ValueError('tuned: is not {"1": {...}, "2": {...}, ...}')
    return [{"steps": int(key), **one} for key, one in sorted(plain.items(), key=lambda item: int(item[0]))]
