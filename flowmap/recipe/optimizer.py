"""The optimiser and its learning rate, a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from flowmap.base.ranges import BelowOne, Count, CountFromZero, FromZero, Range, Rate, check_ranges

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")


def adamw(parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.AdamW:
    """AdamW; fused where all parameters are on CUDA or all on the CPU: one kernel for many parameters, or for each."""
    parameters = list(parameters)
    fused = True if {p.device.type for p in parameters} in ({"cuda"}, {"cpu"}) else None
    optimizer = torch.optim.AdamW(parameters, **settings, fused=fused)
    # Lightning refuses to clip gradients for an optimizer that may unscale them; without a GradScaler none does.
    optimizer._step_supports_amp_scaling = False
    return optimizer


@dataclass(frozen=True)
class AdamW:
    """AdamW with a linear warm-up, then a schedule. Gradients are clipped to clip_norm (0: not clipped).

    schedule: "constant"; "cosine" or "linear" down to 0 at the last step; "inverse_sqrt" (EDM2), lr / sqrt(max(step /
    decay_from, 1)).
    """

    lr: Rate = 1e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    warmup_steps: CountFromZero = 0
    schedule: str = "constant"
    decay_from: Count = 10_000
    clip_norm: FromZero = 0.0

    def __post_init__(self):
        check_ranges(self)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")

    def __call__(self, parameters) -> torch.optim.Optimizer:
        settings = dict(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return adamw(parameters, **settings)

    def lr_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `total_steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warm * self._decay(step, total_steps)

    def _decay(self, step: int, total_steps: int) -> float:
        if self.schedule == "inverse_sqrt":
            return 1 / math.sqrt(max(step / self.decay_from, 1))
        done = min(step / max(total_steps, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
