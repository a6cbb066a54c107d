"""What every metric of a recipe has: settings that are checked when it is made and, where they depend on the data, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.distributed import rank, world_size
from flowmap.flow.types import Cond
from flowmap.metrics.features import check_features, needs_pictures

MAX_SAMPLES, MAX_STEPS = 1_000_000, 100_000
SAMPLES, STEPS = (1, MAX_SAMPLES), (1, MAX_STEPS)
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Sizes(Protocol):
    """What the checks ask of a data set: nothing that reads its samples."""

    @property
    def num_reference(self) -> int: ...

    @property
    def num_held_out(self) -> int: ...

    @property
    def reference_shape(self) -> tuple[int, ...]: ...

    def conditions_at(self, places: Any) -> Cond: ...


@runtime_checkable
class WithTexts(Protocol):
    """A data set of sentences: those of training."""

    @property
    def texts(self) -> Sequence[str]: ...


@runtime_checkable
class WithSources(WithTexts, Protocol):
    """One for editing, whose sentences have the target's style: those of the source's as well."""

    @property
    def source_texts(self) -> Sequence[str]: ...


def within(spec: Any, **allowed: tuple[int, int]) -> None:
    """ValueError where one of these settings lies outside (least, most); None is allowed."""
    for name, (least, most) in allowed.items():
        value = getattr(spec, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}: {value} must lie in {least}..{most}")


def well_formed(features: str) -> None:
    """ValueError where a feature space with a colon in its name is not package.mod:attr; nothing is imported."""
    if ":" in features and not NAME.fullmatch(features):
        raise ValueError(f"features: {features!r} is not of the form package.mod:attr")


def enough(what: str, least: int, data: Sizes) -> None:
    """ValueError unless there are `least` training samples, and held-out ones where there are any, and as many in what the floor draws of them."""
    if data.num_held_out:
        sides = {"held-out": data.num_held_out, "training": data.num_reference}
        drawn = {kind: count * 4 // 5 for kind, count in sides.items()}
    else:
        sides = {"training": data.num_reference}
        drawn = {"training": data.num_reference // 2}
    for kind, count in sides.items():
        if drawn[kind] < least:
            raise ValueError(
                f"metrics: {what} needs {least} {kind} samples or more in each draw of its floor: of {count} it draws {drawn[kind]}"
            )


class Spec:
    """What all have: `images` samples are looked at."""

    images: int

    def __post_init__(self):
        within(self, images=SAMPLES)

    def fits(self, data: Sizes) -> None:
        """ValueError where the data set is too small for the settings, or not of the kind that the metric looks at."""

    def check(self) -> None:
        """ValueError where something that it needs is not on this machine; no network is loaded."""


class InFeatures(Spec):
    """A metric that looks at samples in the space `features`."""

    features: str

    def __post_init__(self):
        super().__post_init__()
        well_formed(self.features)

    def fits(self, data: Sizes) -> None:
        super().fits(data)
        if needs_pictures(self.features) and (len(data.reference_shape) != 3 or data.reference_shape[0] not in (1, 3)):
            shape = tuple(data.reference_shape)
            raise ValueError(
                f"metrics: features {self.features!r} look at pictures of 1 or 3 channels, and the samples have shape {shape}"
            )

    def check(self) -> None:
        check_features(self.features)


def some(x: Tensor, count: int | None, *, seed: int = 0) -> Tensor:
    """`count` rows of x (None or too many: all), in an order that depends on seed alone."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[order.to(x.device)]


def share(x: Tensor) -> Tensor:
    """This process's rows of what every process holds: metrics add up over processes."""
    return x[rank() :: world_size()]
