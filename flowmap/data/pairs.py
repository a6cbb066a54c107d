"""The coupling of noise and data: independent, or pairs that a teacher's ODE has joined, made by `flowmap pairs`.

Sources: rectified flow (arXiv:2209.03003), improved as 2-rectified flow++ (arXiv:2405.20320). Clock: 0 data, 1 noise.
The folder is one of shards (shards.py). Noise is stored as a seed: pair i starts from `noise_of(seed, i, shape)` on any
machine. Pairs of an editing flow start from the latents of its source, in an order drawn by the seed. Pairs by
inversion, real data carried to t = 1, come last and store both ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.images import from_bytes, to_bytes
from flowmap.base.ranges import Count, FromZero, LoRAScale, Seed, Share, check_ranges
from flowmap.base.schema import added
from flowmap.data import shards
from flowmap.data.dataset import Dataset, StoredCond, full_precision
from flowmap.data.shards import Made, check_sums, difference, from_column, open_shards
from flowmap.data.text.styles import StyledDataset
from flowmap.flow.parts import BaseCoupling, Part
from flowmap.flow.path import Linear
from flowmap.flow.prior import LearnedPrior, Start, placed
from flowmap.flow.seeds import seeded
from flowmap.flow.solver import Heun, NoiseAnchored, Solver
from flowmap.flow.types import Cond, RecipeView
from flowmap.flow.types import Coupling as Coupling  # others take it from here

FORMAT = 1
CLOCK = "0 data, 1 noise, linear path"
MADE = Made("coupling.root", "pairs", "flowmap pairs", FORMAT)
DTYPES = ("auto", "uint8", "float16", "float32")


class Guidance(Protocol):
    """How a teacher is guided; settings.py has the kinds."""

    @property
    def scale(self) -> tuple[float, float]: ...

    @property
    def default(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def interval_input(self) -> bool: ...

    def check(self, recipe: RecipeView) -> None: ...


@dataclass(frozen=True)
class Independent(BaseCoupling):
    """Noise is drawn from the recipe's prior, whatever the data."""

    independent: ClassVar[bool] = True


@dataclass(frozen=True)
class TeacherSlot(Part):
    """A frozen teacher, by its card or by the recipe that trains it, with its guidance.

    overrides: key=value for the recipes that train it and its weak model. lora: a LoRA that is added to the network of
    a card of kind diffusers, lora_scale times: a safetensors file, a folder that has one, or a hub id.
    """

    card: str | None = None
    guidance: Guidance | None = None
    overrides: tuple[str, ...] = ()
    recipe: str | None = None
    lora: str | None = added(None)
    lora_scale: LoRAScale = added(1.0)

    def __post_init__(self):
        if (self.card is None) == (self.recipe is None):
            raise ValueError("card: a teacher wants exactly one of card and recipe (one of ours)")
        check_ranges(self)
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(f"lora_scale: {self.lora_scale} wants lora, the file that it scales")

    def check(self, recipe: RecipeView) -> None:
        if not isinstance(recipe.path, Linear):
            raise ValueError(
                "path: a teacher speaks on the linear path, so a recipe with a teacher wants {kind: linear}"
            )

    @property
    def name(self) -> str:
        return (self.card or self.recipe or "") + self.with_lora

    @property
    def with_lora(self) -> str:
        """The LoRA in words, after the name of what it is added to; empty without one."""
        if self.lora is None:
            return ""
        times = "" if self.lora_scale == 1.0 else f" times {self.lora_scale:g}"
        return f" with the LoRA {self.lora}{times}"


@dataclass(frozen=True)
class Pairs(BaseCoupling):
    """num pairs (x0, x1) joined by the ODE of a `teacher`, or of the student that `recipe` trains.

    guidance    the one scale of all pairs, by default that of the teacher's guidance
    inverted    the share of pairs that are real samples carried to noise
    dtype       of x0 on disk; "auto" is uint8 for pictures and float16 for other samples
    root        the folder, by default in runs/

    Conditions are the data's: each class in turn, or with text the rows of the data, in an order drawn by `seed`.
    """

    teacher: TeacherSlot | None = None
    recipe: str | None = None
    guidance: FromZero | None = None
    num: Count = 50_000
    solver: Solver = Heun(steps=18, grid="rho", euler_last=True)
    inverted: Share = 0.0
    seed: Seed = 0
    dtype: str = "auto"
    shard_items: Count = 1000
    root: str = ""
    paired: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        if (self.teacher is None) == (self.recipe is None):
            raise ValueError("teacher: pairs want exactly one of teacher (a card) and recipe (one of ours)")
        if self.guidance is not None and self.teacher is not None and self.teacher.guidance is None:
            raise ValueError(f"guidance: {self.guidance} wants teacher.guidance, which says what is guided and how")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.inverted and isinstance(self.solver, NoiseAnchored):
            raise ValueError(
                "solver: the anchored rule runs from noise to data only; choose another for inverted pairs"
            )

    def stored_dtype(self, pictures: bool) -> str:
        """`dtype`, with "auto" resolved for samples that are pictures in [-1, 1], or are not."""
        return self.dtype if self.dtype != "auto" else "uint8" if pictures else "float16"

    def check(self, recipe: RecipeView) -> None:
        if recipe.artifact != "student":
            raise ValueError("coupling: pairs are no use to an autoencoder or an auxiliary model; leave it independent")
        if recipe.prior.learned and self.inverted:
            raise ValueError(
                "coupling.inverted: real data carried to t = 1 has no code; with a learned prior it must be 0"
            )

    @property
    def num_inverted(self) -> int:
        """How many pairs, the last ones, start from real data."""
        return round(self.num * self.inverted)


COUPLINGS = {"independent": Independent, "pairs": Pairs}


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """The noise of pair i, `shape`, float32 on the CPU: a function of (seed, i) alone."""
    return torch.randn(*shape, generator=seeded(f"pair/{seed}/{i}"))


def noises(seed: int, pairs: Sequence[int], shape: Sequence[int]) -> Tensor:
    return torch.stack([noise_of(seed, int(i), shape) for i in pairs])


def starts_of(
    prior: LearnedPrior | None, seed: int, pairs: Sequence[int], shape: Sequence[int], sources: Tensor | None = None
) -> Start:
    """The starts of those pairs, a function of (seed, pair), and of the prior if it is a learned one, which should be
    `exact`.

    sources (N, *shape): the starts of an editing flow's pairs, taken repeatedly in an order drawn by the seed.
    """
    if sources is not None:
        order = torch.randperm(len(sources), generator=seeded(f"sources/{seed}"))
        return Start(sources[order[torch.as_tensor(list(pairs)) % len(order)]])
    noise = noises(seed, pairs, shape)
    if prior is None:
        return Start(noise)
    coarse = torch.stack([torch.randn(prior.size + 1, generator=seeded(f"code/{seed}/{int(i)}")) for i in pairs])
    return placed(prior, noise, coarse)


def pack(x0: Tensor, dtype: str) -> Tensor:
    """x0 as it is kept: uint8 are the grey levels of [-1, 1], rounded and cut off."""
    if dtype == "uint8":
        return to_bytes(x0).cpu()
    return x0.to(getattr(torch, dtype)).cpu()


def unpack(kept: Tensor) -> Tensor:
    """What training sees of it, float32."""
    return from_bytes(kept) if kept.dtype == torch.uint8 else kept.float()


def contents(data: Dataset, seed: int) -> dict[str, Any]:
    """The facts about the data that pairs depend on: shape, classes, length, a hash of some samples and of pair 0's
    noise.
    """
    rows = torch.linspace(0, len(data) - 1, 16).long().tolist()
    x0, cond = data.__getitems__(rows)
    shape = list(data.shape)
    start = starts_of(None, seed, [0], shape, sources_of(data)).x1[0]
    hashed = {"samples": _hash(x0, *(cond[key] for key in sorted(cond))), "noise": _hash(start)}
    return {"shape": shape, "num_classes": data.num_classes, "length": len(data), **hashed}


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def sources_of(data: Dataset) -> Tensor | None:
    """What the pairs of an editing flow start from; None of any other data."""
    return data.sources if isinstance(data, StyledDataset) else None


def has_text(data: Dataset) -> bool:
    """Whether conditions are more than classes, so that pairs keep the row of the data that they come from."""
    return bool(set(data.example_conditions()) - {"class"})


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of complete pairs. Raises ValueError with the progress of incomplete ones."""
    return shards.read_index(folder, MADE)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first key of provenance that differs.

    Weights that are not on this machine (None here) are not compared. Where the weights are the same, the hash of the
    recipe that trained them is not compared: it changes with how they are measured.
    """
    return difference(there, _filled(here, there))


def _filled(here: Any, there: Any) -> Any:
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        return here
    unknown = here.get("weights") is None
    taken = {"weights"} if unknown else {"hash"} if here["weights"] == there.get("weights") else set()
    return {k: there.get(k) if k in taken else _filled(v, there.get(k)) for k, v in here.items()}


class PairedDataset:
    """The pairs that training reads instead of the data: batches (x0, cond, x1). `data` has everything else."""

    reads_disk: ClassVar[bool] = True

    def __init__(self, folder: Path, data: Dataset, identity: Mapping[str, Any], prior: LearnedPrior | None = None):
        """Open the pairs. Raises ValueError that names the first key that differs, or a torn shard.

        identity: the provenance that the pairs must have. prior: the learned prior from which they start.
        """
        self.data, self.index, self._prior = data, read_index(folder), prior and prior.exact()
        found = first_difference(self.index["identity"], identity) or difference(
            self.index["contents"], contents(data, identity["seed"])
        )
        if found:
            raise ValueError(
                f"coupling.root: {folder}: holds other pairs: {found}; `flowmap pairs` makes them for this recipe"
            )
        self._seed, self._shape, self._has_text = identity["seed"], self.index["contents"]["shape"], has_text(data)
        generated, inverted = (
            [shard for shard in self.index["shards"] if shard["inverted"] == which] for which in (False, True)
        )
        self.num_generated = sum(shard["rows"] for shard in generated)
        check_sums(folder, self.index, MADE)
        self._generated, self._inverted = (
            open_shards(folder, part, MADE) if part else None for part in (generated, inverted)
        )

    def __len__(self) -> int:
        return sum(len(table) for table in (self._generated, self._inverted) if table is not None)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Cond, Tensor]:
        """The pairs of those numbers: x0 and x1 float32 (B, *shape), and cond as the data has it, with the code z of a
        prior.
        """
        x0, cond, x1 = self.stored_batch(indices)
        return x0, {name: full_precision(value) for name, value in self.data.complete(cond).items()}, x1

    def stored_batch(self, indices: Sequence[int]) -> tuple[Tensor, StoredCond, Tensor]:
        """The same with the conditions as a worker of the loader reads them (data/dataset.py)."""
        pairs = torch.as_tensor(list(indices))
        real = pairs >= self.num_generated
        x0, x1 = (torch.empty(len(pairs), *self._shape) for _ in range(2))
        label, place = (torch.empty(len(pairs), dtype=torch.int64) for _ in range(2))
        for chosen, read in ((~real, self._read_generated), (real, self._read_inverted)):
            if bool(chosen.any()):
                x0[chosen], label[chosen], place[chosen], x1[chosen] = read(pairs[chosen])
        if self._prior is None:
            return x0, self._conditions(label, place), x1
        start = starts_of(self._prior, self._seed, pairs.tolist(), self._shape)  # all of them: none is inverted
        return x0, {**self._conditions(label, place), **start.conditioning}, start.x1

    def _read_generated(self, pairs: Tensor) -> tuple[Tensor, ...]:
        assert self._generated is not None
        table = self._generated[pairs.tolist()]
        return *self._common(table), starts_of(None, self._seed, pairs.tolist(), self._shape, sources_of(self.data)).x1

    def _read_inverted(self, pairs: Tensor) -> tuple[Tensor, ...]:
        assert self._inverted is not None
        table = self._inverted[(pairs - self.num_generated).tolist()]
        return *self._common(table), from_column(table, "x1", self._shape).float()

    def _common(self, table: Any) -> tuple[Tensor, ...]:
        labels, places = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("label", "place"))
        return unpack(from_column(table, "x0", self._shape)), labels, places

    def _conditions(self, label: Tensor, place: Tensor) -> StoredCond:
        if self._has_text:
            return self.data.stored_conditions_at(place)
        return {} if self.data.num_classes is None else {"class": label}
