"""The plan of an export: a student with a checked number of steps and guidance scale."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

from flowmap.samplers import Deterministic, Gamma
from flowmap.student.conditions import no_scale
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import Autoencoder


@dataclass(frozen=True)
class Export:
    """A student with its default steps and guidance scale (None if the scale is not an input).

    text: include the text encoders.
    """

    student: Student
    steps: int
    guidance: float | None
    text: bool = True

    @property
    def sampler(self) -> Deterministic | Gamma:
        sampler = self.student.config.sampler
        assert isinstance(sampler, (Deterministic, Gamma))  # plan_of has checked
        return sampler

    @property
    def gamma(self) -> float:
        return self.sampler.gamma if isinstance(self.sampler, Gamma) else 0.0

    @property
    def times(self) -> tuple[float, ...]:
        return self.sampler.times(self.steps)

    def autoencoder(self) -> Any | None:
        """The student's frozen autoencoder (model, shift, scale: latents are (z - shift) scale), or None."""
        return self.student.autoencoder

    @property
    def unit(self) -> bool:
        """Whether the autoencoder works on images in [0, 1] instead of [-1, 1]."""
        spec = self.student.config.autoencoder
        return isinstance(spec, Autoencoder) and spec.unit

    def note(self, to: str) -> dict[str, Any]:
        """The content of the folder's stamp."""
        from flowmap import __version__

        config = self.student.config
        facts = {"recipe": config.recipe, "recipe_hash": config.recipe_hash, "step": config.step}
        return {"format": 1, "to": to, "steps": self.steps, "guidance": self.guidance, **facts, "flowmap": __version__}


@dataclass(frozen=True)
class Written:
    """The result of a writer: the Python lines that load and call the folder, and notes for its card."""

    snippet: str
    notes: tuple[str, ...] = ()


def make_plan(
    student: Student, steps: int | None, guidance: float | None, *, merge: bool = True, text: bool = True
) -> Export:
    """The plan, with defaults for steps (the sampler's largest) and guidance. ValueErrors name the setting.

    The grid, gamma and scale are those that were tuned for these steps, if any. merge: merge a LoRA student's adapters
    into its weights.
    """
    if student.config.prior is not None:
        raise ValueError("student: starts at a learned prior; only students that start at N(0, I) can be exported")
    student = student.merged() if merge else student
    if student.config.guidance_interval is not None:
        raise ValueError("student: takes the interval of guidance as an input; such students cannot be exported")
    sampler = student.config.sampler
    if not isinstance(sampler, (Deterministic, Gamma)) or type(sampler) not in (Deterministic, Gamma):
        raise ValueError(f"sampler: {type(sampler).__name__} cannot be exported; what can: deterministic, gamma")
    steps = max(sampler.steps) if steps is None else steps
    sampler.times(steps)
    scale = _scale(student, student.config.scale_at(steps) if guidance is None else guidance)
    return Export(_tuned_for(student, steps), steps, scale, text)


def _tuned_for(student: Student, steps: int) -> Student:
    """The student with the settings that were tuned for these steps as its own; a warning if others were tuned."""
    config = student.config
    if others := [str(one.steps) for one in config.tuned if one.steps != steps]:
        what = f"an export has one grid, gamma and scale: those tuned for {', '.join(others)} steps are left out"
        warnings.warn(f"--steps: {what}", stacklevel=3)
    if not config.tuned:
        return student
    return Student(replace(config, sampler=config.sampler_at(steps), tuned=()), student.flow_map, student.folder)


def _scale(student: Student, guidance: float | None) -> float | None:
    if student.config.guidance is None:
        if guidance is not None:
            raise ValueError(f"--guidance: {guidance:g} was given, but {no_scale(student.config.baked_guidance)}")
        return None
    low, high, default = student.config.guidance
    scale = default if guidance is None else guidance
    if not 0 <= scale < math.inf:
        raise ValueError(f"--guidance: {scale} must be 0 or more (trained on {low:g}..{high:g})")
    if not low <= scale <= high:
        warnings.warn(
            f"--guidance: {scale:g} lies outside {low:g}..{high:g}, the scales that this student was trained on",
            stacklevel=3,
        )
    return float(scale)
