"""Metrics of a flow itself: of its paths, of its end points, of real samples carried through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flowmap.flow.solver import Heun, NoiseAnchored, Solver
from flowmap.metrics.real import Device
from flowmap.metrics.spec import SAMPLES, STEPS, Drawn, Spec, within

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from flowmap.metrics.held_out import InversionScore, LossByTimeScore
    from flowmap.metrics.trajectories import EndpointScore, StraightnessScore

NOTHING_HELD_OUT = "metrics: inversion and loss_by_time look at held-out samples, and data.held_out is 0"


@dataclass(frozen=True)
class Straightness(Spec):
    """How far the paths of `images` samples are from straight lines, over `steps` steps."""

    images: int = 256
    steps: int = 32
    of_velocity: ClassVar[bool] = True

    def __post_init__(self):
        within(self, images=SAMPLES, steps=STEPS)

    def build(self) -> StraightnessScore:
        from flowmap.metrics.trajectories import StraightnessScore

        return StraightnessScore()

    def build_on(self, data: Any, device: Device = "cpu") -> StraightnessScore:
        return self.build().to(device)

    def measure(self, metric: StraightnessScore, drawn: Drawn) -> dict[str, float]:
        metric.reset()
        for path, times in drawn.paths(self.images, self.steps):
            metric.update(path, times)
        return self.report(metric)

    def report(self, metric: StraightnessScore) -> dict[str, float]:
        return {"straightness": float(metric.compute())}


@dataclass(frozen=True)
class EndpointError(Spec):
    """The distance of `images` few-step end points from those of `steps` steps from the same noise."""

    images: int = 256
    steps: int = 32
    of_endpoints: ClassVar[bool] = True

    def __post_init__(self):
        within(self, images=SAMPLES, steps=STEPS)

    def build(self) -> EndpointScore:
        from flowmap.metrics.trajectories import EndpointScore

        return EndpointScore()

    def build_on(self, data: Any, device: Device = "cpu") -> EndpointScore:
        return self.build().to(device)

    def measure(self, metric: EndpointScore, drawn: Drawn) -> dict[str, float]:
        metric.reset()
        for few, many in drawn.endpoints(self.images, self.steps):
            metric.update(few, many)
        return self.report(metric)

    def report(self, metric: EndpointScore) -> dict[str, float]:
        return {"endpoint_error": float(metric.compute())}


@dataclass(frozen=True)
class Inversion(Spec):
    """Reconstruction by inversion: held-out samples carried to t = 1 by the velocity, and back by the sampler.

    The velocity is solved by `solver` for `images` samples. inversion_error is the mean squared error per value, of
    samples as training sees them; inversion_noise the mean squared norm of the noise per value (1 for N(0, I)),
    inversion_z its deviation in standard errors. If guidance is an input, its default is used; a guided velocity does
    not carry real samples to N(0, I).
    """

    images: int = 256
    solver: Solver = Heun(steps=32)
    normal_noise: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.solver, NoiseAnchored):
            raise ValueError("solver: the anchored rule runs from noise to data only; choose another to invert")

    @property
    def num_starts(self) -> int:
        return 0

    def fits(self, data: Any, *, conditional: bool = True, paired: bool = False) -> None:
        if not data.num_held_out:
            raise ValueError(NOTHING_HELD_OUT)

    def build(self) -> InversionScore:
        from flowmap.metrics.held_out import InversionScore

        return InversionScore()

    def build_on(self, data: Any, device: Device = "cpu") -> InversionScore:
        return self.build().to(device)

    def measure(self, metric: InversionScore, drawn: Drawn) -> dict[str, float]:
        metric.reset()
        for x0, x1, back in drawn.inversions(self.images, self.solver):
            metric.update(x0, x1, back)
        return self.report(metric)

    def report(self, metric: InversionScore) -> dict[str, float]:
        return {f"inversion_{name}": value for name, value in metric.compute().items()}


@dataclass(frozen=True)
class LossByTime(Spec):
    """The mean squared error per value of the velocity against the conditional one, at each of `times`.

    The conditional velocity is x1 - x0 on the linear path. The `images` draws are of the recipe's own coupling and were
    not trained on: held-out samples with new noise, or new pairs that their teacher makes from other noise. The lowest
    value is the variance of x1 - x0 given xt: 0 for a straight coupling alone.
    """

    images: int = 1000
    times: tuple[float, ...] = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
    of_velocity: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not self.times or not all(0 <= t <= 1 for t in self.times) or len(set(self.times)) < len(self.times):
            raise ValueError(f"times: {self.times} must be different numbers in [0, 1]")

    @property
    def num_starts(self) -> int:
        return 0

    def fits(self, data: Any, *, conditional: bool = True, paired: bool = False) -> None:
        if not paired and not data.num_held_out:
            raise ValueError(NOTHING_HELD_OUT)

    def build(self) -> LossByTimeScore:
        from flowmap.metrics.held_out import LossByTimeScore

        return LossByTimeScore(self.times)

    def build_on(self, data: Any, device: Device = "cpu") -> LossByTimeScore:
        return self.build().to(device)

    def measure(self, metric: LossByTimeScore, drawn: Drawn) -> dict[str, float]:
        metric.reset()
        for place, velocity, vt in drawn.velocities(self.images, self.times):
            metric.update(place, velocity, vt)
        return self.report(metric)

    def report(self, metric: LossByTimeScore) -> dict[str, float]:
        return {f"loss_t{t:g}": value for t, value in zip(self.times, metric.losses(), strict=True)}
