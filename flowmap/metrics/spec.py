"""What every metric of a recipe is: settings that are checked when the recipe is read and, where they depend on the
data, before anything is trained; and the way in which it measures a row of metrics.json (`Drawn`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from flowmap.flow.solver import Solver
from flowmap.flow.types import Cond
from flowmap.metrics.features import check_features, check_weights, needs_pictures
from flowmap.metrics.real import Device

MAX_SAMPLES, MAX_STEPS = 1_000_000, 100_000
SAMPLES, STEPS = (1, MAX_SAMPLES), (1, MAX_STEPS)
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

Classes = Callable[[int], Tensor]  # number of samples -> their classes (num,), in the proportions of generated samples


@dataclass(frozen=True)
class DrawnBatch:
    """A batch of this process's generated samples: decoded, float32, on the device of the metrics.

    first: how many of this process's samples came before. conditions, captions: functions that return those of the
    batch; captions only where evaluation.captions gives them.
    """

    samples: Tensor
    first: int
    world: int
    conditions: Callable[[], Cond]
    captions: Callable[[], Sequence[str]] = tuple

    def of_first(self, num: int) -> int:
        """How many of the batch are among the first `num` samples of all processes."""
        return min(max(num // self.world - self.first, 0), len(self.samples))


class Drawn(Protocol):
    """What one row of metrics.json is measured on: the samples of one sampler, and the velocity field behind it.

    Samples are drawn once, and every metric counts each batch of them (`Spec.update`). Of all other batches every
    process has its own share; a batch is drawn when it is requested.
    """

    @property
    def sources(self) -> Sequence[str] | None:
        """The sentences that an editing student starts from, or the true parts of an infilling one; otherwise None."""
        ...

    def texts(self, num: int) -> list[str]:
        """The first generated sentences of all processes."""
        ...

    def conditions(self, num: int) -> Cond:
        """The conditions of the first generated samples of all processes."""
        ...

    def paths(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (trajectory (steps + 1, B, ...), times (steps + 1,)) of Euler's method on the velocity."""
        ...

    def endpoints(self, num: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (samples, end points of the flow after `steps` steps from the same noise)."""
        ...

    def inversions(self, num: int, solver: Solver) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of (held-out samples, the noise that the velocity carries them to, samples from that noise)."""
        ...

    def velocities(self, num: int, times: Sequence[float]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index of the time, velocity, conditional velocity) over batches of the recipe's own coupling."""
        ...


class Sizes(Protocol):
    """What the checks ask of a data set: nothing that reads its samples."""

    @property
    def num_reference(self) -> int: ...

    @property
    def num_held_out(self) -> int: ...

    @property
    def num_classes(self) -> int | None: ...

    @property
    def reference_shape(self) -> tuple[int, ...]: ...

    def example_conditions(self) -> Cond: ...


@runtime_checkable
class WithTexts(Protocol):
    """A data set of sentences: those of training."""

    @property
    def texts(self) -> Sequence[str]: ...


@runtime_checkable
class WithSources(WithTexts, Protocol):
    """A data set for editing, with sentences of the target style, that also has those of the source style."""

    @property
    def source_texts(self) -> Sequence[str]: ...


def within(spec: Any, **allowed: tuple[int, int]) -> None:
    """Raise ValueError if one of these settings is outside (least, most); None is allowed."""
    for name, (least, most) in allowed.items():
        value = getattr(spec, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}: {value} must lie in {least}..{most}")


def well_formed(features: str) -> None:
    """Raise ValueError if a feature space with a colon in its name is not package.mod:attr; nothing is imported."""
    if ":" in features and not NAME.fullmatch(features):
        raise ValueError(f"features: {features!r} is not of the form package.mod:attr")


def enough(what: str, least: int, data: Sizes) -> None:
    """Raise ValueError unless each draw of the real-vs-real baseline has `least` samples.

    A draw has four fifths of the held-out and of the training samples, or half of the training samples where nothing
    is held out.
    """
    if data.num_held_out:
        sides = {"held-out": data.num_held_out, "training": data.num_reference}
        drawn = {kind: count * 4 // 5 for kind, count in sides.items()}
    else:
        sides = {"training": data.num_reference}
        drawn = {"training": data.num_reference // 2}
    for kind, count in sides.items():
        if drawn[kind] < least:
            raise ValueError(
                f"metrics: {what} needs {least} {kind} samples or more in each draw of its floor: "
                f"of {count} it draws {drawn[kind]}"
            )


class Spec:
    """The base of all metrics: `images` samples are measured.

    on_samples: it compares generated samples with real ones and needs nothing else, so that it is also measured during
    training and by `flowmap compare`. of_velocity: its figures depend on the velocity alone, not on the sampler, and
    are computed once for all rows of a flow. of_endpoints: it is a distance to many-step end points; its figures come
    last in a row and are also taken against the teacher's. normal_noise: it expects noise of N(0, I). wants_captions:
    it compares with the captions of evaluation.captions.
    """

    images: int
    on_samples: ClassVar[bool] = False
    of_velocity: ClassVar[bool] = False
    of_endpoints: ClassVar[bool] = False
    normal_noise: ClassVar[bool] = False
    wants_captions: ClassVar[bool] = False

    def __post_init__(self):
        within(self, images=SAMPLES)

    @property
    def feature_space(self) -> str | None:
        """The network in whose features the metric compares samples."""
        return None

    @property
    def picture_network(self) -> str | None:
        """The name of the network that generated samples pass through, if it is a known one."""
        return self.feature_space

    @property
    def num_starts(self) -> int:
        """The number of samples that are drawn from noise."""
        return self.images

    @property
    def num_texts(self) -> int:
        """The number of samples that are decoded to sentences."""
        return 0

    def held_bytes(self, width: int, training: int, held_out: int) -> float:
        """The most bytes that the metric holds on the device, in a space of `width` features.

        training, held_out: the numbers of real samples of each kind. By default a few numbers.
        """
        return 0.0

    def fits(self, data: Any, *, conditional: bool = True, paired: bool = False) -> None:
        """Raise ValueError if the data set is too small for the settings, or not of the kind that is measured.

        conditional: the network is given the conditions of the data. paired: the coupling makes pairs of its own, so
        that nothing need be held out.
        """

    def check(self) -> None:
        """Raise ValueError if something that the metric needs is not on this machine; no network is loaded."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose contents the figures depend on."""
        return ()

    def build_on(self, data: Any, device: Device = "cpu") -> Any:
        """The metric on that device, with what it takes from the data set already counted or fitted."""
        raise NotImplementedError

    def begin(self, metric: Any) -> None:
        """Forget what was counted for the previous row. metric: as `build_on` returned it."""

    def update(self, metric: Any, batch: DrawnBatch) -> None:
        """Count a batch of generated samples; by default nothing is counted."""

    def measure(self, metric: Any, drawn: Drawn) -> dict[str, float]:
        """The figures of one row under their names in metrics.json, after all its batches were counted."""
        raise NotImplementedError

    def baseline(self, metric: Any, data: Any, classes: Classes | None = None) -> dict[str, float]:
        """The figures of real samples, for the `floor` of metrics.json; {} where the metric has none."""
        return {}


class InFeatures(Spec):
    """A metric of samples in the space `features`.

    weights: the file, folder or hub id of the network's weights; None: the default place (metrics/picture_nets.py).
    """

    features: str
    weights: str | None = None

    def __post_init__(self):
        super().__post_init__()
        well_formed(self.features)
        check_weights(self.features, self.weights)

    @property
    def feature_space(self) -> str | None:
        return self.features

    def fits(self, data: Sizes, *, conditional: bool = True, paired: bool = False) -> None:
        super().fits(data, conditional=conditional, paired=paired)
        if needs_pictures(self.features) and (len(data.reference_shape) != 3 or data.reference_shape[0] not in (1, 3)):
            shape = tuple(data.reference_shape)
            raise ValueError(
                f"metrics: features {self.features!r} look at pictures of 1 or 3 channels, "
                f"and the samples have shape {shape}"
            )

    def check(self) -> None:
        check_features(self.features, self.weights)
