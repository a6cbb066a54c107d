"""Settings of a student for one number of steps, as `flowmap tune` finds them: guidance scale, gamma and time grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flowmap.base.ranges import Calls, FromZero, Share, check_ranges
from flowmap.flow.types import Sampler
from flowmap.samplers import Deterministic, Gamma
from flowmap.samplers.grids import FewStep


@dataclass(frozen=True)
class Figure:
    """A figure of samples that took no part in the choice, by the student's own settings and by the tuned ones."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class Tuned:
    """What replaces a student's own settings in a call of `steps` steps that does not give them.

    guidance: the scale, None where it is the student's default. middle: the steps - 1 times between t_max and 0.
    figures: what was measured when they were found, the metric that chose them first.
    """

    steps: Calls
    guidance: FromZero | None = None
    gamma: Share = 0.0
    middle: tuple[Share, ...] = ()
    figures: tuple[Figure, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self):
        check_ranges(self)
        if len(self.middle) != self.steps - 1:
            raise ValueError(f"middle: {self.middle} must be {self.steps - 1} times, one less than the steps")

    def sampler(self, base: Sampler) -> Deterministic | Gamma:
        """The sampler of these settings; what they do not name is that of `base`. ValueError for another kind."""
        if not can_be_tuned(base):
            raise ValueError(f"sampler: {type(base).__name__} cannot be tuned; what can: deterministic, gamma")
        grid: dict[str, Any] = {one.name: getattr(base, one.name) for one in fields(FewStep)}
        grid["middle"] = self.middle or grid["middle"]
        return Gamma(gamma=self.gamma, **grid) if self.gamma else Deterministic(**grid)


def can_be_tuned(sampler: Sampler) -> bool:
    """Whether it is one of the samplers that apply the map on a grid, with or without noise between steps."""
    return type(sampler) in (Deterministic, Gamma)


def tuned_json(tuned: tuple[Tuned, ...]) -> dict[str, Any]:
    """The settings as config.json has them: {"2": {"guidance": ..., "gamma": ..., "middle": [...]}, ...}, each with its
    "figures" if there are any.
    """
    return {str(one.steps): _row(one) for one in tuned}


def _row(one: Tuned) -> dict[str, Any]:
    row: dict[str, Any] = {"guidance": one.guidance, "gamma": one.gamma, "middle": list(one.middle)}
    return row | ({"figures": [asdict(figure) for figure in one.figures]} if one.figures else {})


def tuned_rows(plain: Any) -> list[dict[str, Any]]:
    """The same as rows with their steps. ValueError where it is not such a mapping."""
    if not isinstance(plain, Mapping) or not all(
        key.isdecimal() and isinstance(one, Mapping) for key, one in plain.items()
    ):
        raise ValueError('tuned: is not {"1": {...}, "2": {...}, ...}')
    return [{"steps": int(key), **one} for key, one in sorted(plain.items(), key=lambda item: int(item[0]))]
