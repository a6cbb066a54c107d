"""Embeddings of the scalars and labels on which a network is conditioned.

Networks embed t itself with low frequencies, in float32 or better: the derivative of log-sigma is unbounded at both
ends of the path, and high frequencies make dF/dt large (Align Your Flow, arXiv:2506.14603; sCM, arXiv:2410.11081,
section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.precision import without_autocast
from flowmap.flow.types import Cond

TOKENS = "tokens"  # the kind of conditions that a network attends to
TOKEN_STD = 0.3  # initial std of their embeddings


@dataclass(frozen=True)
class ExtraCondition:
    """A condition in addition to class and guidance scale, by its name in cond.

    kind "number": an integer below `size`, -1 or absent for none. kind "context": `size` numbers in any shape, zeros or
    absent for none. kind "code": the code of a learned prior, `size` numbers, never absent. kind "interval": two times
    in [0, 1], absent for (0, 1); it has no effect until it is trained. kind "tokens": `length` integers below `size`,
    -1 for padding, all -1 or absent for none; a network with attention reads them. vocabulary: tokens of the same
    vocabulary share their embeddings.
    """

    name: str
    size: int
    kind: str
    length: int = 0
    vocabulary: str = ""

    def __post_init__(self):
        assert self.kind in (*EXTRA_EMBEDDINGS, TOKENS), self.kind

    def example(self, rows: int) -> Tensor:
        """Zeros in the shape of the condition with `rows` rows; for an interval, (0, 1)."""
        if self.kind == TOKENS:
            return torch.zeros(rows, self.length, dtype=torch.int64)
        if self.kind == "interval":
            return torch.tensor([[0.0, 1.0]]).repeat(rows, 1)
        return torch.zeros(rows, dtype=torch.int64) if self.kind == "number" else torch.zeros(rows, self.size)


class ScalarEmbedding(nn.Module):
    """An embedding of scalars near [0, 1], (B,) -> (B, width); with `silent`, zero until it is trained.

    It consists of num_frequencies sinusoids from 1/8 to `cycles` periods over the unit interval and a two-layer
    perceptron, in float32 or better, also under autocast.
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
        with without_autocast(value.device):
            wide = torch.promote_types(self.hidden.weight.dtype, torch.float32)
            octaves = torch.linspace(-3, math.log2(self.cycles), self.num_frequencies, dtype=wide, device=value.device)
            angle = value.to(wide).unsqueeze(-1) * (2 * math.pi * torch.exp2(octaves))
            waves = torch.cat([torch.cos(angle), torch.sin(angle)], -1).to(self.hidden.weight.dtype)
            return self.out(F.silu(self.hidden(waves)))


class NumberEmbedding(nn.Embedding):
    """An embedding of integers (B,) below `size`, with an extra row for none: (B, width)."""

    def __init__(self, size: int, width: int):
        super().__init__(size + 1, width)

    def forward(self, value: Tensor | None) -> Tensor:
        if value is None:
            return self.weight[-1]
        return super().forward(torch.where(value < 0, self.num_embeddings - 1, value))


class ContextEmbedding(nn.Linear):
    """A linear embedding of (B, ...) with `size` numbers per row: (B, width)."""

    def forward(self, value: Tensor | None) -> Tensor:
        return self.bias if value is None else super().forward(value.flatten(1).to(self.weight.dtype))


class CodeEmbedding(nn.Module):
    """An embedding of the code z of a learned prior: (B, size) -> (B, width)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(size, width), nn.Linear(width, width)

    def forward(self, z: Tensor | None) -> Tensor:
        if z is None:
            raise ValueError("z: this network is conditioned on the code of a learned prior, and cond has none")
        return self.out(F.silu(self.hidden(z.to(self.hidden.weight.dtype))))


class IntervalEmbedding(nn.Module):
    """The sum of the embeddings of the ends of intervals of time, (B, 2) -> (B, width); zero until it is trained."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.ends = nn.ModuleList(ScalarEmbedding(width, silent=True) for _ in range(size))

    def forward(self, value: Tensor | None) -> Tensor:
        if value is None:
            value = torch.tensor([0.0, 1.0], device=next(self.parameters()).device)
        return sum(embed(end) for embed, end in zip(self.ends, value.unbind(-1), strict=True))


EXTRA_EMBEDDINGS = {
    "number": NumberEmbedding,
    "context": ContextEmbedding,
    "code": CodeEmbedding,
    "interval": IntervalEmbedding,
}


class TokenEmbeddings(nn.Module):
    """Conditions of kind "tokens", for attention: embeddings (B, L, width), and which of them are tokens, (B, L) bool.

    L is the sum of their lengths. An embedding is that of the token plus that of its place, which differs from
    condition to condition.
    """

    def __init__(self, conditions: Sequence[ExtraCondition], width: int):
        super().__init__()
        self.conditions = tuple(conditions)
        sizes = {one.vocabulary: one.size for one in conditions}
        self.tables = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        self.places = nn.Parameter(torch.empty(sum(one.length for one in conditions), width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=TOKEN_STD)

    def forward(self, cond: Cond | None, rows: int) -> tuple[Tensor, Tensor] | None:
        """Both, for `rows` rows; None if cond has none of these conditions."""
        given = {} if cond is None else cond
        if all(given.get(one.name) is None for one in self.conditions):
            return None
        found, real = [], []
        for one in self.conditions:
            tokens = given.get(one.name)
            if tokens is None:
                tokens = torch.full((rows, one.length), -1, device=self.places.device)
            found.append(self.tables[one.vocabulary](tokens.clamp_min(0)))
            real.append(tokens >= 0)
        return torch.cat(found, 1) + self.places, torch.cat(real, 1)


def split_by_kind(
    conditions: Sequence[ExtraCondition],
) -> tuple[tuple[ExtraCondition, ...], tuple[ExtraCondition, ...]]:
    """(those that are summed, those of kind "tokens")."""
    tokens = tuple(one for one in conditions if one.kind == TOKENS)
    return tuple(one for one in conditions if one.kind != TOKENS), tokens


class ExtraEmbeddings(nn.ModuleList):
    """The sum of the embeddings of extra conditions, (B, width), or (width,) if cond has none of them."""

    def __init__(self, extra_conditions: Sequence[ExtraCondition], width: int):
        super().__init__(EXTRA_EMBEDDINGS[one.kind](one.size, width) for one in extra_conditions)
        self.names = tuple(one.name for one in extra_conditions)

    def forward(self, cond: Cond) -> Tensor:
        return sum(embed(cond.get(name)) for name, embed in zip(self.names, self, strict=True))


class Conditioning(nn.Module):
    """The sum (B, width) of the embeddings of departure, arrival, guidance scale, class and extra conditions.

    All but departure are optional. The branches for arrival and guidance start at zero, so that a student with a
    teacher's weights gives the teacher's output. The arrival branch embeds the interval t - s; with_arrival=False
    leaves it out.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int | None,
        arrival: bool,
        guidance: bool,
        cycles: float,
        extra_conditions: Sequence[ExtraCondition] = (),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.departure = ScalarEmbedding(width, cycles=cycles)
        self.arrival = ScalarEmbedding(width, cycles=cycles, silent=True) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.further = ExtraEmbeddings(extra_conditions, width) if extra_conditions else None

    def forward(self, t: Tensor, s: Tensor, cond, *, with_arrival: bool = True) -> Tensor:
        cond = cond or {}
        c = self.departure(t)
        if self.arrival is not None and with_arrival:
            c = c + self.arrival(t - s)
        if self.guidance is not None:
            c = c + self.guidance(_guidance_input(t, cond))
        if self.label is not None:
            label = cond["class"] if "class" in cond else torch.full(t.shape, -1, device=t.device)
            assert self.num_classes is not None
            c = c + self.label(torch.where(label < 0, self.num_classes, label))
        if self.further is not None:
            c = c + self.further(cond)
        return c


def branches(
    arrival: ScalarEmbedding | None, guidance: ScalarEmbedding | None, t: Tensor, s: Tensor, cond
) -> Tensor | None:
    """The sum (B, width) of the branches for the interval t - s and the guidance scale; None without branches."""
    extra = None if arrival is None else arrival(t - s)
    if guidance is None:
        return extra
    scale = guidance(_guidance_input(t, cond))
    return scale if extra is None else extra + scale


def _guidance_input(t: Tensor, cond) -> Tensor:
    """The input (B,) of the guidance branch: scales from 1 to 5 mapped to [0, 1]; the default scale is 1."""
    return ((cond["guidance"] if "guidance" in cond else torch.ones_like(t)) - 1) / 4
