"""Embeddings of the scalars and labels that a network is conditioned on.

Time goes in as t itself, through low frequencies, in float32 or better: the derivative of log-sigma explodes at both ends of the path,
and high frequencies make dF/dt large (Align Your Flow, arXiv:2506.14603; sCM, arXiv:2410.11081, section 4.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Further = tuple[tuple[str, int], ...]
"""Conditions beside the class: a name and how many classes it has, or 0 for one that is shaped like a sample."""


class ScalarEmbedding(nn.Module):
    """A scalar near [0, 1] as a vector of `width`; with `silent`, zero until it is trained.

    num_frequencies sinusoids from 1/8 to `cycles` periods over the unit interval, then a two-layer perceptron; all of it in float32 or
    better whatever autocast says.  (B,) -> (B, width).
    """

    def __init__(self, width: int, *, num_frequencies: int = 32, cycles: float = 4.0, silent: bool = False):
        super().__init__()
        self.num_frequencies, self.cycles = num_frequencies, cycles
        self.hidden = nn.Linear(2 * num_frequencies, width)
        self.out = nn.Linear(width, width)
        if silent:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, value: Tensor) -> Tensor:
        kind = value.device.type if torch.amp.is_autocast_available(value.device.type) else "cpu"  # "meta" has no autocast to switch off
        with torch.autocast(kind, enabled=False):
            wide = torch.promote_types(self.hidden.weight.dtype, torch.float32)
            octaves = torch.linspace(-3, math.log2(self.cycles), self.num_frequencies, dtype=wide, device=value.device)
            angle = value.to(wide).unsqueeze(-1) * (2 * math.pi * torch.exp2(octaves))
            waves = torch.cat([torch.cos(angle), torch.sin(angle)], -1).to(self.hidden.weight.dtype)
            return self.out(F.silu(self.hidden(waves)))


class Conditioning(nn.Module):
    """Departure, and as asked arrival, guidance scale and class, summed into one vector (B, width).

    The branches for arrival and guidance are zero at the start, so that a teacher's weights loaded beside them give the teacher's output.
    The arrival branch sees the interval t - s.
    """

    def __init__(self, width: int, *, num_classes: int | None, arrival: bool, guidance: bool, cycles: float, further: Further = (), size: int = 0):
        """further: more conditions; size: the entries of a sample."""
        super().__init__()
        self.num_classes = num_classes
        self.departure = ScalarEmbedding(width, cycles=cycles)
        self.arrival = ScalarEmbedding(width, cycles=cycles, silent=True) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.names = tuple(name for name, _ in further)
        self.further = nn.ModuleList(nn.Embedding(count + 1, width) if count else nn.Linear(size, width) for _, count in further)

    def forward(self, t: Tensor, s: Tensor, cond) -> Tensor:
        cond = cond or {}
        c = self.departure(t)
        if self.arrival is not None:
            c = c + self.arrival(t - s)
        if self.guidance is not None:
            c = c + self.guidance(_guidance_input(t, cond))
        if self.label is not None:
            label = cond["class"] if "class" in cond else torch.full(t.shape, -1, device=t.device)
            c = c + self.label(torch.where(label < 0, self.num_classes, label))
        for name, layer in zip(self.names, self.further, strict=True):
            c = c + _embedded(layer, cond.get(name), t)
        return c


def _embedded(layer: nn.Module, value: Tensor | None, t: Tensor) -> Tensor:
    """A further condition as (B, width): -1, and zeros of one that is shaped like a sample, are "none", as is a condition that is not there."""
    if isinstance(layer, nn.Linear):
        return layer(value.flatten(1).to(layer.weight.dtype)) if value is not None else layer.bias
    value = torch.full(t.shape, -1, device=t.device) if value is None else value
    return layer(torch.where(value < 0, layer.num_embeddings - 1, value))


def branches(arrival: ScalarEmbedding | None, guidance: ScalarEmbedding | None, t: Tensor, s: Tensor, cond) -> Tensor | None:
    """What the branches for the interval t - s and for the guidance scale add to a foreign network's embedding, (B, width); None without."""
    extra = None if arrival is None else arrival(t - s)
    if guidance is None:
        return extra
    scale = guidance(_guidance_input(t, cond))
    return scale if extra is None else extra + scale


def _guidance_input(t: Tensor, cond) -> Tensor:
    """The guidance scale as its embedding wants it, (B,): scales of 1 to 5 on [0, 1]; 1 where cond has none."""
    return ((cond["guidance"] if "guidance" in cond else torch.ones_like(t)) - 1) / 4
