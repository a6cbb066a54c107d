"""Random numbers of samples: a function of (name, which sample, which draw), whatever the batch, the process and the device.

Whatever draws takes a `Generator`: torch's own, whose numbers depend on how many are drawn at once, or a RowGenerator, whose do not.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import overload

import torch
from torch import Tensor

from flowmap.flow.philox import WORD, philox
from flowmap.flow.seeds import seeded

SINGLE = WORD  # the number that stands for all draws of one number a row, in the place of a draw's own
CHUNK = 16  # numbers that torch's normal_ makes together on a CPU


class RowGenerator:
    """Random numbers for samples `rows`, (N,) int64: each method gives one draw, N rows of it, and the next call another one.

    Row i's k-th draw is a function of (name, rows[i], k) alone. Integers and uniform numbers are the same to the bit on every device, normal
    ones to rounding. step: the training step that all rows belong to, for `together`.
    """

    def __init__(self, name: str, rows: Tensor, step: int = 0):
        self.name, self.rows, self.step, self.device = name, rows, step, rows.device
        digest = hashlib.sha256(name.encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        self._wide = self._single = self._together = 0
        self._words: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: slice | Tensor) -> RowGenerator:
        """The same generator, in the same state, for some of its rows."""
        part = copy.copy(self)
        part.rows = self.rows[rows]
        part._words = None if self._words is None else self._words[:, rows]
        return part

    def for_codes(self, name: str) -> RowGenerator:
        """A second generator of the same rows, which draws nothing of this one."""
        return RowGenerator(f"{name}/{self.name}", self.rows, self.step)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal draws, (N, *shape) float32: two words u, v give sqrt(-2 ln u) (cos, sin)(2 pi v), in float64 (Box, Muller)."""
        count = math.prod(shape)
        words = self._blocks(-(-count // 4)).double()
        radius = words[::2].add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[1::2].mul_(2 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # (2, N, blocks, 2)
        return pairs.permute(1, 2, 0, 3).reshape(len(self), -1)[:, :count].float().reshape(len(self), *shape)

    def single_normal(self) -> Tensor:
        """One standard normal draw a row, (N,) float32: the inverse of the distribution at the middle of the word's interval."""
        return torch.special.ndtri((self._word().double() + 0.5) * 2.0**-32).float()

    def uniform(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Draws in [0, 1), (N, *shape) float32; one a row, (N,), where no shape is given."""
        if shape is None:
            return (self._word() >> 8).float() * 2.0**-24
        count = math.prod(shape)
        words = self._blocks(-(-count // 4)).permute(1, 2, 0).reshape(len(self), -1)[:, :count]
        return ((words >> 8).float() * 2.0**-24).reshape(len(self), *shape)

    def integers(self, high: int) -> Tensor:
        """One draw of 0 .. high - 1 a row, (N,) int64; high is far below 2^32."""
        return (self._word() * high) >> 32

    def together(self, high: int) -> int:
        """One draw of 0 .. high - 1 for all rows of the step: the same in every micro-batch and process."""
        self._together += 1
        digest = hashlib.sha256(f"{self.name}/{self.step}/{self._together}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % high

    def _blocks(self, count: int) -> Tensor:
        """(4, N, count) words of the next draw."""
        block = torch.arange(count, device=self.device)
        words = self._philox(block, self._wide)
        self._wide += 1
        return words

    def _word(self) -> Tensor:
        """(N,): the next word of each row's sequence of single draws, four of which are made at a time."""
        place = self._single % 4
        if place == 0:
            self._words = self._philox(torch.tensor([self._single // 4], device=self.device), SINGLE).squeeze(-1)
        self._single += 1
        assert self._words is not None
        return self._words[place]

    def _philox(self, block: Tensor, draw: int) -> Tensor:
        shape = (len(self), len(block))
        row = self.rows[:, None]
        words = (
            block.expand(shape),
            torch.full(shape, draw, device=self.device),
            (row & WORD).expand(shape),
            (row >> 32 & WORD).expand(shape),
        )
        return philox(words, self._key)


Generator = torch.Generator | RowGenerator


def normal_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Standard normal draws with x's shape, device and dtype.

    Drawn in float32 on the generator's device (x's without one) and then moved, so that a generator on the CPU gives the same noise to every
    device and precision. A RowGenerator has one row for each of x's.
    """
    if isinstance(generator, RowGenerator):
        return generator.normal(tuple(x.shape[1:])).to(device=x.device, dtype=x.dtype)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(
        device=x.device, dtype=x.dtype
    )


def normal_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """torch.randn of a generator on the CPU, with first rows that do not depend on how many follow.

    torch makes normal numbers 16 at a time, and draws the last 16 again where their count is no multiple: here whole ones are drawn.
    """
    count = math.prod(shape)
    return torch.randn(-(-count // CHUNK) * CHUNK, generator=generator)[:count].reshape(shape)


def uniforms(n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
    """n float32 draws in [0, 1), drawn on the generator's device, then moved."""
    if isinstance(generator, RowGenerator):
        return generator.uniform().to(device)
    where = device if generator is None else generator.device
    return torch.rand(n, generator=generator, device=where, dtype=torch.float32).to(device)


def normals(n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
    """n float32 standard normal draws, drawn on the generator's device, then moved."""
    if isinstance(generator, RowGenerator):
        return generator.single_normal().to(device)
    where = device if generator is None else generator.device
    return torch.randn(n, generator=generator, device=where, dtype=torch.float32).to(device)


def integers(n: int, high: int, generator: Generator) -> Tensor:
    """n draws of 0 .. high - 1, int64 on the generator's device."""
    if isinstance(generator, RowGenerator):
        return generator.integers(high)
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def one_of(high: int, generator: Generator) -> int:
    """One draw of 0 .. high - 1 for all samples of a step."""
    if isinstance(generator, RowGenerator):
        return generator.together(high)
    return int(torch.randint(high, (), generator=generator, device=generator.device))


def places_of(n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
    """Which samples of the run n draws are for, (n,) int64: the generator's rows, or the first n where it has none."""
    return generator.rows.to(device) if isinstance(generator, RowGenerator) else torch.arange(n, device=device)


@overload
def for_codes(generator: torch.Generator) -> torch.Generator: ...
@overload
def for_codes(generator: Generator | None) -> Generator | None: ...
def for_codes(generator: Generator | None) -> Generator | None:
    """A second stream of the generator's own seed. The first one is not touched: codes cost noise, times and the rest none of their draws."""
    if generator is None:
        return None
    return (
        generator.for_codes("code")
        if isinstance(generator, RowGenerator)
        else seeded(f"code/{generator.initial_seed()}", generator.device)
    )


def of_samples(generator: Generator, places: Tensor) -> RowGenerator:
    """What samples at those places, (N,) int64, draw on their way: a function of the generator's state, which stays as it is.

    Ask before the samples' starts are drawn, a function of whose number that state is. A RowGenerator gives its own rows at those places.
    """
    if isinstance(generator, RowGenerator):
        return generator.at(places)
    state = generator.clone_state()
    return RowGenerator(f"samples/{int(torch.randint(2**62, (), generator=state, device=state.device))}", places)
