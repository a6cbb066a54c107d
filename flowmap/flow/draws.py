"""Random numbers per sample: a function of (name, sample, draw), independent of batch, process and device.

Functions that draw take a `Generator`: torch's, for which numbers depend on how many are drawn at once, or a
RowGenerator, for which they do not.
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

SINGLE = WORD  # the draw index that all draws of one number per row share
CHUNK = 16  # torch's normal_ draws in chunks of this size on a CPU


class RowGenerator:
    """Random numbers for samples `rows`, (N,) int64. Each call of a method makes a new draw with N rows.

    Row i's k-th draw is a function of (name, rows[i], k) only. Integers and uniform numbers are bit-equal on every
    device, normal ones equal to rounding. `step` is the training step of all rows, for `together`. host: the same rows
    on the CPU, where they are known.
    """

    def __init__(self, name: str, rows: Tensor, step: int = 0, host: Tensor | None = None):
        self.name, self.rows, self.step, self.device = name, rows, step, rows.device
        self._host = host
        digest = hashlib.sha256(name.encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        self._wide = self._single = self._together = 0
        self._words: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def host_rows(self) -> Tensor:
        """The rows on the CPU."""
        return self.rows.cpu() if self._host is None else self._host

    def at(self, rows: slice | Tensor) -> RowGenerator:
        """A generator in the same state for some of the rows."""
        part = copy.copy(self)
        part._host = None
        part.rows = self.rows[rows]
        part._words = None if self._words is None else self._words[:, rows]
        return part

    def for_codes(self, name: str) -> RowGenerator:
        """A second, independent generator for the same rows; this one's state does not change."""
        return RowGenerator(f"{name}/{self.name}", self.rows, self.step, self._host)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal draws (N, *shape), float32.

        Box-Muller in float64: two words u, v give sqrt(-2 ln u) (cos, sin)(2 pi v).
        """
        count = math.prod(shape)
        words = self._blocks(-(-count // 4)).double()
        radius = words[::2].add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[1::2].mul_(2 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # (2, N, blocks, 2)
        return pairs.permute(1, 2, 0, 3).reshape(len(self), -1)[:, :count].float().reshape(len(self), *shape)

    def single_normal(self) -> Tensor:
        """One standard normal draw per row, (N,) float32: the quantile at the middle of the word's interval."""
        return torch.special.ndtri((self._word().double() + 0.5) * 2.0**-32).float()

    def uniform(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Uniform draws in [0, 1), (N, *shape) float32; (N,) without a shape."""
        if shape is None:
            return (self._word() >> 8).float() * 2.0**-24
        count = math.prod(shape)
        words = self._blocks(-(-count // 4)).permute(1, 2, 0).reshape(len(self), -1)[:, :count]
        return ((words >> 8).float() * 2.0**-24).reshape(len(self), *shape)

    def integers(self, high: int) -> Tensor:
        """One draw of 0 .. high - 1 per row, (N,) int64; high must be far below 2^32."""
        return (self._word() * high) >> 32

    def together(self, high: int) -> int:
        """One draw of 0 .. high - 1 for all rows of the step, the same in every micro-batch and process."""
        self._together += 1
        digest = hashlib.sha256(f"{self.name}/{self.step}/{self._together}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % high

    def _blocks(self, count: int) -> Tensor:
        """The words of the next draw, (4, N, count)."""
        block = torch.arange(count, device=self.device)
        words = self._philox(block, self._wide)
        self._wide += 1
        return words

    def _word(self) -> Tensor:
        """The next word (N,) of each row's sequence of single draws, which are made four at a time."""
        place = self._single % 4
        if place == 0:
            self._words = self._philox(torch.full((1,), self._single // 4, device=self.device), SINGLE).squeeze(-1)
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

    They are drawn in float32 on the generator's device (x's without a generator), then moved, so that a CPU generator
    gives the same noise for every device and precision. A RowGenerator must have one row per row of x.
    """
    if isinstance(generator, RowGenerator):
        return generator.normal(tuple(x.shape[1:])).to(device=x.device, dtype=x.dtype)
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32)
    return noise.to(device=x.device, dtype=x.dtype)


def normal_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """torch.randn of a CPU generator, with rows that do not depend on how many follow.

    torch draws normal numbers 16 at a time, and redraws the last 16 unless the count is a multiple of 16; this function
    rounds the count up.
    """
    count = math.prod(shape)
    return torch.randn(-(-count // CHUNK) * CHUNK, generator=generator)[:count].reshape(shape)


def uniforms(n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
    """n uniform float32 draws in [0, 1), made on the generator's device, then moved."""
    if isinstance(generator, RowGenerator):
        return generator.uniform().to(device)
    where = device if generator is None else generator.device
    return torch.rand(n, generator=generator, device=where, dtype=torch.float32).to(device)


def normals(n: int, device: torch.device | str, generator: Generator | None) -> Tensor:
    """n standard normal float32 draws, made on the generator's device, then moved."""
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
    """The indices (n,) int64 of the samples in the run: the generator's rows, or 0 .. n - 1 if it has none."""
    return generator.rows.to(device) if isinstance(generator, RowGenerator) else torch.arange(n, device=device)


@overload
def for_codes(generator: torch.Generator) -> torch.Generator: ...
@overload
def for_codes(generator: Generator | None) -> Generator | None: ...
def for_codes(generator: Generator | None) -> Generator | None:
    """A second generator from the same seed, for codes. The first one's state and later draws do not change."""
    if generator is None:
        return None
    return (
        generator.for_codes("code")
        if isinstance(generator, RowGenerator)
        else seeded(f"code/{generator.initial_seed()}", generator.device)
    )


def of_samples(generator: Generator, places: Tensor) -> RowGenerator:
    """A generator for draws during sampling, for the samples `places`, (N,) int64.

    It is a function of the generator's state, which does not change. Call it before drawing the initial noise: the
    state afterwards depends on the number of samples. A RowGenerator gives its own rows at those places.
    """
    if isinstance(generator, RowGenerator):
        return generator.at(places)
    state = generator.clone_state()
    return RowGenerator(f"samples/{int(torch.randint(2**62, (), generator=state, device=state.device))}", places)
