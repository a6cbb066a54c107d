"""Ranges of numeric settings, declared in their type annotations and checked by `check_ranges`.

    steps: Annotated[int, Range(1, 1000)] = 50
    def __post_init__(self): check_ranges(self)

Every range has an upper bound, so that a typing error in a setting cannot allocate unbounded memory.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

MAX_STEPS = 100_000  # network calls of a sampler or a solver


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; `above` excludes `least` itself, `below` excludes `most`."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        if self.most <= 1:
            return f"must lie in {'(' if self.above else '['}{self.least:g}, {self.most:g}{')' if self.below else ']'}"
        low = f"above {self.least:g}" if self.above else f"{self.least:g} or more"
        return f"must be {low}, {'below' if self.below else 'at most'} {self.most:g}"


Count = Annotated[int, Range(1, 1_000_000_000)]
CountFromZero = Annotated[int, Range(0, 1_000_000_000)]
Calls = Annotated[int, Range(1, MAX_STEPS)]
Batch = Annotated[int, Range(1, 1_000_000)]
Width = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, 1000)]
Side = Annotated[int, Range(1, 16_384)]
Heads = Annotated[int, Range(1, 1024)]
Multiplier = Annotated[int, Range(1, 64)]
Classes = Annotated[int, Range(1, 1_000_000)]
Vocab = Annotated[int, Range(1, 10_000_000)]
MaxTokens = Annotated[int, Range(2, 100_000)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Number = Annotated[float, Range(-1e6, 1e6)]
Positive = Annotated[float, Range(0, 1e6, above=True)]
FromZero = Annotated[float, Range(0, 1e6)]
LoRAScale = Annotated[float, Range(-100, 100)]
Rate = Annotated[float, Range(0, 100, above=True)]
Rho = Annotated[float, Range(0.1, 100)]
Cycles = Annotated[float, Range(0, 10_000, above=True)]
Ratio = Annotated[float, Range(0, 100, above=True)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
InsideOne = Annotated[float, Range(0, 1, above=True, below=True)]


def check_ranges(settings: Any) -> None:
    """Raise a ValueError if a numeric field is out of its range or not finite.

    The message names the field, its value and the allowed range.
    """
    for name, hint in _ranged(type(settings)).items():  # type: ignore[arg-type]  # every class has a hash
        _check(name, getattr(settings, name), hint)


@cache
def _ranged(cls: type) -> dict[str, Any]:
    """The type hints that contain a range, by field name."""
    return {name: hint for name, hint in typing.get_type_hints(cls, include_extras=True).items() if ranges_in(hint)}


def ranges_in(hint: Any) -> list[Range]:
    """All ranges in a type hint, including those of tuple entries."""
    if typing.get_origin(hint) is Annotated:
        return [extra for extra in hint.__metadata__ if isinstance(extra, Range)]
    return [found for part in typing.get_args(hint) for found in ranges_in(part)]


def _check(name: str, value: Any, hint: Any) -> None:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if hint.__origin__ is int and not isinstance(value, int):
            raise ValueError(f"{name}: {value!r} must be a whole number")
        if value not in hint.__metadata__[0]:
            raise ValueError(f"{name}: {value!r} {hint.__metadata__[0]}")
    elif origin is tuple:
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        for i, (one, part) in enumerate(zip(value, parts, strict=True)):
            _check(f"{name}[{i}]", one, part)
    elif value is not None:  # of Number | None
        _check(name, value, parts[0])
