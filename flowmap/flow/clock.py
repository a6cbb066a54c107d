"""The clocks of pretrained models: convert our (x, t) to a model's schedule, and its prediction to our velocity.

Our state on the linear path is xt = (1 - t) x0 + t x1. A model's state a x0 + b x1, divided by a + b, is ours at
t = b / (a + b). `at(t)` returns the coefficients of the model's state and the time that its network embeds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmap.flow.host import on_device
from flowmap.flow.path import Coefficients, convert, wide
from flowmap.flow.types import broadcast_time

SMALL_UNIT = 25.0  # a network whose fastest sinusoid has 4 periods in t
LARGEST_LOGIT = 20.0  # of t, for schedules that end at a = 0 (zero terminal SNR): t = 1 - 2e-9


@dataclass(frozen=True)
class FlowClock:
    """Flow matching (SD3, FLUX, Sana, QwenImage): t is the model's sigma, and the network embeds unit x t."""

    unit: float = 1000.0

    def at(self, t: Tensor) -> tuple[Coefficients, Tensor]:
        t = wide(t)
        return Coefficients(1 - t, t), self.unit * t

    @property
    def embeds_t(self) -> bool:
        """Whether the network embeds t at low frequencies."""
        return self.unit <= SMALL_UNIT

    def with_unit(self, unit: float) -> FlowClock:
        """The same clock for a network that embeds unit x t."""
        return replace(self, unit=unit)


class TableClock:
    """A discrete variance-preserving schedule (such as DDPM), given as its products alpha_bar (N,), from data to noise.

    The network's time is interpolated between two entries in log-SNR, that is in the logit of t, and clamped to 0 and
    N - 1 beyond the table. Times above the table's last are replaced by the last: the model was not trained there, and
    "epsilon" does not determine x0. With `unit` the network embeds unit x t instead of a place in the table.
    """

    unit: float | None = None

    def __init__(self, alphas_cumprod: Tensor):
        table = alphas_cumprod.double().cpu()
        if (
            table.ndim != 1
            or len(table) < 2
            or not bool(((table >= 0) & (table < 1)).all() and (table.diff() < 0).all())
        ):
            raise ValueError("alphas_cumprod must be a table of falling numbers in [0, 1)")
        a, b = table.sqrt(), (1 - table).sqrt()
        self.times = b / (a + b)
        self.logits = torch.logit(self.times).clamp(max=LARGEST_LOGIT)
        self.t_min, self.t_max = float(self.times[0]), float(self.times[-1])
        self._placed: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor) -> tuple[Coefficients, Tensor]:
        t = wide(t).double().clamp(0, self.t_max)
        size = torch.hypot(1 - t, t)
        time = self._place(t) if self.unit is None else self.unit * t
        return Coefficients((1 - t) / size, t / size), time

    def _place(self, t: Tensor) -> Tensor:
        """The place of t in the table, interpolated."""
        logits = self._logits_on(t.device)
        logit = torch.logit(t.clamp(self.t_min, 1)).clamp(max=LARGEST_LOGIT)
        right = torch.searchsorted(logits, logit).clamp(1, len(logits) - 1)
        share = (logit - logits[right - 1]) / (logits[right] - logits[right - 1])
        return right - 1 + share.clamp(0, 1)

    def _logits_on(self, device: torch.device) -> Tensor:
        """The table on that device. It is copied once: a copy in every call would wait for the device."""
        if device == self.logits.device:
            return self.logits
        found = self._placed.get(device)
        if found is None:
            found = on_device(self.logits, device)
            # what a compiler or a mode made must not outlive it
            if type(found) is Tensor and not found.is_inference() and not torch.compiler.is_compiling():
                self._placed[device] = found
        return found

    @property
    def embeds_t(self) -> bool:
        """Whether the network embeds t at low frequencies."""
        return self.unit is not None and self.unit <= SMALL_UNIT

    def with_unit(self, unit: float) -> TableClock:
        """The same clock for a network that embeds unit x t."""
        clock = copy.copy(self)
        clock.unit = unit
        return clock


def velocity_of(predict, clock: FlowClock | TableClock, x: Tensor, t: Tensor, prediction: str) -> Tensor:
    """The velocity x1 - x0 at our (x, t), from a network predict(state, time) -> `prediction` on the given clock.

    `prediction` is one of flow.path.PREDICTIONS.
    """
    at, time = clock.at(t)
    if prediction == "x0":  # at b = 0 it does not determine x1
        first = clock.t_min if isinstance(clock, TableClock) else 1e-4
        at, time = clock.at(wide(t).clamp(min=first))
    state = (broadcast_time(at.a + at.b, x) * x).to(x.dtype)
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    return convert(predict(state, time.to(precise)), state, at, source=prediction, target="linear_velocity")
