"""Make pairs of noise and data that a teacher's ODE joins, shard by shard; samples of a teacher are their data.

After an interruption at any moment, a second call completes the folder. A shard is a fixed range of pairs and a
function of that range alone. data/pairs.py describes the files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.distributed import is_child
from flowmap.base.files import read_json, write_json
from flowmap.base.progress import LogFunction, Progress
from flowmap.build.data import build_data
from flowmap.build.prior import build_prior
from flowmap.build.teacher import BuiltTeacher, build_pairs_teacher
from flowmap.data import Dataset, Independent, PairedDataset, Pairs
from flowmap.data.pairs import MADE, contents, has_text, pack, read_index, sources_of, starts_of, unpack
from flowmap.data.shards import INDEX, PLAN, check_sums, shard_name, to_column, write_stream
from flowmap.data.sources import optional
from flowmap.data.teacher_samples import Blank
from flowmap.estimate.module_check import check_own_samples
from flowmap.estimate.teacher_check import check_teacher
from flowmap.flow.prior import LearnedPrior, Start, chi_square
from flowmap.flow.solver import Velocity, invert
from flowmap.flow.types import Cond
from flowmap.objectives import FlowMatching
from flowmap.plan.cards import pairs_teacher
from flowmap.plan.plan import ResolvedRun
from flowmap.plan.provenance import pairs_identity, scale_of
from flowmap.prepare.write import check_plan, making, once, sweep_stale, whole, write_shard
from flowmap.recipe import Recipe

KEPT = ("rows", "bytes", "sha256", "inverted")  # The keys of a shard's summary that index.json repeats.
OFF = 4.0  # The number of standard errors from which inverted noise raises a warning.


def make_pairs(
    run: ResolvedRun,
    folder: Path | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    log: Callable[[str], None] | None = None,
    waiting: Callable[[], None] | None = None,
) -> dict[str, Any] | None:
    """Make the pairs and return the contents of index.json, or None while other processes still make shards.

    folder: by default the one where the recipe looks for them. shard (r, n): make the shards whose number is r modulo
    n. waiting: as in only_process (base/files.py).

    Raises ValueError if the folder contains other pairs. WriteError names a shard that could not be written; earlier
    shards remain.
    """
    if batch_size < 1:
        raise ValueError(f"batch: {batch_size} must be 1 or more")
    optional("pyarrow")
    folder = folder or Path(run.pairs.root)
    begins = shard[0] == 0 and not (folder / PLAN).is_file()  # before another process, which makes another part, begins
    maker = Maker.of(run, device)
    with making(folder, shard, waiting):
        slot = pairs_teacher(run.recipe)
        if slot is not None and begins:  # before hours of evaluating it
            alone = run.recipe.changed(teacher=slot, coupling=Independent(), objective=FlowMatching())
            _check(alone, maker, device, log)
        check_plan(folder, maker.plan(), maker.thing)
        _fill(maker, folder, shard, batch_size, log)
    summaries = [whole(folder, number) for number in range(len(maker.ranges()))]
    complete = [one for one in summaries if one is not None]
    return (
        None
        if len(complete) < len(summaries)
        else once(folder, lambda: _finish(maker, folder, complete, log or (lambda message: None)))
    )


def _check(recipe: Recipe, maker: Maker, device: torch.device | str, log: LogFunction | None) -> None:
    """Check the teacher; without data, a module's prediction on samples of its own."""
    real = not isinstance(recipe.data, Blank)
    check_teacher(recipe, maker.teacher, maker.data, device=device, prior=maker.prior, log=log, compare=real)
    if not real:
        x0, cond = maker.samples(range(min(len(maker.data), maker.spec.num)))
        own = Dataset("own samples", x0, x0[:0], labels := cond.get("class"), labels, maker.data.num_classes)
        check_own_samples(recipe, maker.teacher, own, device=device, log=log)


@dataclass(frozen=True)
class Maker:
    """All that determines pair i: the teacher's velocity at its one scale, the data, and the settings.

    Conditions and real samples come from the data.
    """

    spec: Pairs
    data: Dataset
    teacher: BuiltTeacher
    scale: float | None
    identity: Mapping[str, Any]
    device: torch.device | str
    conditional: bool
    dtype: str
    prior: LearnedPrior | None = None
    thing: str = "set of pairs"

    @staticmethod
    def of(run: ResolvedRun, device: torch.device | str) -> Maker:
        recipe, spec, data = run.recipe, run.pairs, build_data(run)
        data.hold_text(None)  # pairs do not depend on the precision of the run that reads them
        if spec.num_inverted and sources_of(data) is not None:
            raise ValueError(
                "coupling.inverted: an editing flow carries sentences to sentences, and back by itself; "
                "here it must be 0"
            )
        if spec.num_inverted > len(data):
            raise ValueError(f"coupling.inverted: wants {spec.num_inverted} real samples, the data has {len(data)}")
        pictures = recipe.data.in_pixels and len(data.shape) == 3
        dtype = spec.stored_dtype(pictures)
        if dtype == "uint8" and not pictures:
            raise ValueError("coupling.dtype: uint8 is for pictures in [-1, 1]; allowed here: float16, float32")
        teacher = build_pairs_teacher(run, data).to(device)
        prior = build_prior(run)
        prior = prior and prior.exact()
        given = spec, data, teacher, scale_of(run), pairs_identity(run), device, recipe.data.conditional, dtype, prior
        return Maker(*given, "set of samples" if isinstance(recipe.data, Blank) else "set of pairs")

    def plan(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "contents": contents(self.data, self.spec.seed),
            "shard_items": self.spec.shard_items,
        }

    def ranges(self) -> list[range]:
        """Return the pairs of each shard; no shard has both generated and inverted ones."""
        start, step = self.spec.num - self.spec.num_inverted, self.spec.shard_items
        parts = ((0, start), (start, self.spec.num))
        return [range(at, min(at + step, end)) for first, end in parts for at in range(first, end, step)]

    def inverted(self, pairs: Sequence[int]) -> bool:
        return pairs[0] >= self.spec.num - self.spec.num_inverted

    @torch.no_grad()
    def columns(self, pairs: Sequence[int]) -> tuple[dict[str, Tensor], int]:
        """Return the columns of those pairs, and the network calls for each pair.

        The columns are x0, label, place, and x1 of inverted pairs. All of the pairs must be inverted, or none.
        """
        label, place, cond = self._conditions(pairs)
        columns = {"label": label, "place": place}
        if self.inverted(pairs):
            columns["x0"] = pack(self.data.__getitems__(place.tolist())[0], self.dtype)
            velocity = self.velocity(cond, len(pairs))
            solved = invert(velocity, unpack(columns["x0"]).to(self.device), self.spec.solver)
            columns["x1"] = solved.x.half().cpu()
        else:
            start = self.starts(pairs)
            solved = self.spec.solver(
                self.velocity({**cond, **start.conditioning}, len(pairs)), start.x1.to(self.device)
            )
            columns["x0"] = pack(solved.x, self.dtype)
        self._must_be_finite(solved.x, columns, pairs)
        return columns, solved.calls * self.teacher.calls_per_step

    def velocity(self, cond: Cond, num: int) -> Velocity:
        """Return the teacher's velocity at these conditions (num, ...) and the one scale."""
        guided = cond if self.scale is None else {**cond, "guidance": torch.full((num,), self.scale)}
        on_device = {key: value.to(self.device) for key, value in guided.items()} or None
        return lambda x, t: self.teacher.guided.velocity(x, t, on_device)

    def starts(self, pairs: Sequence[int]) -> Start:
        """Return the starting points of those pairs."""
        return starts_of(self.prior, self.spec.seed, pairs, self.data.shape, sources_of(self.data))

    def samples(self, pairs: Sequence[int]) -> tuple[Tensor, Cond]:
        """Return (x0, cond) of those pairs, as training sees them."""
        return unpack(self.columns(pairs)[0]["x0"]), self._conditions(pairs)[2]

    def _conditions(self, pairs: Sequence[int]) -> tuple[Tensor, Tensor, Cond]:
        """Return label, place in the data and conditions of those pairs; -1 where there is no label or no place."""
        i, none = torch.tensor(pairs), torch.full((len(pairs),), -1)
        text, classes = has_text(self.data), self.data.num_classes
        place = self._places(i) if text or self.inverted(pairs) else none
        cond = self.data.conditions_at(place) if bool((place >= 0).all()) else {"class": i % classes} if classes else {}
        return cond.get("class", none), place, cond if self.conditional else {}

    def _places(self, i: Tensor) -> Tensor:
        """Return places in the data, in an order drawn with the seed and repeated; inverted pairs take its first
        ones.
        """
        first = self.spec.num - self.spec.num_inverted
        return self._order[torch.where(i >= first, i - first, i) % len(self._order)]

    @cached_property
    def _order(self) -> Tensor:
        return torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.spec.seed))

    def _must_be_finite(self, solved: Tensor, columns: Mapping[str, Tensor], pairs: Sequence[int]) -> None:
        kept = columns.get("x1", columns["x0"])
        bad = ~(solved.cpu().flatten(1).isfinite().all(1) & kept.float().flatten(1).isfinite().all(1))
        if bool(bad.any()):
            pair = pairs[int(bad.nonzero()[0])]
            raise RuntimeError(f"pair {pair}: the solver's result is not finite as {kept.dtype}; take more steps")


def _fill(maker: Maker, folder: Path, shard: tuple[int, int], batch_size: int, log: LogFunction | None = None) -> None:
    rank, world = shard
    mine = list(enumerate(maker.ranges()))[rank::world]
    missing = [(number, pairs) for number, pairs in mine if whole(folder, number) is None]
    with Progress(
        sum(len(pairs) for _, pairs in missing), f"making the {maker.thing}", None if is_child() else log
    ) as count:
        for number, pairs in missing:
            _make(maker, folder, number, pairs, batch_size, count)


def _make(
    maker: Maker,
    folder: Path,
    number: int,
    pairs: range,
    batch_size: int,
    count: Callable[[int], None] = lambda solved: None,
) -> None:
    """Solve one shard in memory and write it; count: is given the number of pairs of each batch."""
    import pyarrow

    batches: list[Any] = []
    summary: dict[str, Any] = {"rows": len(pairs), "inverted": maker.inverted(pairs), "calls": 0, "squared_norms": []}
    for at in range(0, len(pairs), batch_size):
        part = pairs[at : at + batch_size]
        columns, summary["calls"] = maker.columns(part)
        arrays = {
            "pair": pyarrow.array(list(part)),
            **{name: pyarrow.array(columns.pop(name).numpy()) for name in ("label", "place")},
        }
        batches.append(pyarrow.record_batch(arrays | {name: to_column(value) for name, value in columns.items()}))
        if "x1" in columns:
            summary["squared_norms"] += columns["x1"].double().flatten(1).square().sum(1).tolist()
        count(len(part))
    write_shard(folder, number, lambda path: write_stream(path, batches), summary)


def _finish(maker: Maker, folder: Path, summaries: list[dict[str, Any]], log: Callable[[str], None]) -> dict[str, Any]:
    """Write index.json and return it. The same shards give the same bytes."""
    norms = [norm for shard in summaries for norm in shard["squared_norms"]]
    index = {
        **maker.plan(),
        "dtype": maker.dtype,
        "nfe": max(shard["calls"] for shard in summaries),
        "rows": maker.spec.num,
        "shards": [
            {"file": shard_name(i), **{key: one[key] for key in KEPT if key in one}} for i, one in enumerate(summaries)
        ],
        "inverted_noise": chi_square(norms, math.prod(maker.data.shape)) if norms else None,
    }
    if not (folder / INDEX).is_file() or read_json(folder / INDEX) != index:
        sweep_stale(folder, (PLAN, INDEX))
        write_json(folder / INDEX, index)
    if norms and abs(index["inverted_noise"]["z"]) > OFF:
        found = described(index["inverted_noise"])
        warnings.warn(
            f"coupling.inverted: {found}: the teacher does not carry these data to N(0, I)",
            stacklevel=4,
        )
    elif norms:
        log(described(index["inverted_noise"]))
    return index


def described(found: Mapping[str, float]) -> str:
    law = f"chi-square has {found['expected_mean']:.4g} and {found['expected_std']:.4g}"
    return (
        f"squared norm of {found['count']} inverted noises: mean {found['mean']:.4g}, std {found['std']:.4g}; {law}: "
        f"{found['z']:+.1f} standard errors, p = {found['p']:.2g}"
    )


def verify(
    run: ResolvedRun, folder: Path | None = None, *, num: int, device: torch.device | str = "cpu", batch_size: int = 256
) -> tuple[float, int]:
    """Return the largest difference between pairs on disk and the same pairs made again, and the pair that has it.

    num: the number of pairs, evenly spread. The difference is 0 if the same machine makes them in the same batches;
    one grey level of uint8 is 0.0078.
    """
    if num < 1 or batch_size < 1:
        raise ValueError(f"--verify: {num} and --batch: {batch_size} must be 1 or more")
    maker = Maker.of(run, device)
    folder = folder or Path(run.pairs.root)
    check_sums(folder, read_index(folder), MADE, again=True)
    kept = PairedDataset(folder, maker.data, maker.identity, maker.prior)
    wanted = torch.linspace(0, len(kept) - 1, min(num, len(kept))).long().tolist()
    gaps: dict[int, float] = {}
    for part in ([i for i in wanted if i < kept.num_generated], [i for i in wanted if i >= kept.num_generated]):
        for at in range(0, len(part), batch_size):
            pairs = part[at : at + batch_size]
            gaps |= zip(pairs, _gaps(maker, kept, pairs), strict=True)
    where = max(gaps, key=gaps.__getitem__)
    return gaps[where], where


def _gaps(maker: Maker, kept: PairedDataset, pairs: list[int]) -> list[float]:
    """Return the difference between each of those pairs, made again, and the one on disk."""
    columns, _ = maker.columns(pairs)
    x0, _, x1 = kept.__getitems__(pairs)
    gap = (unpack(columns["x0"]) - x0).abs().flatten(1).amax(1)
    return (
        torch.maximum(gap, (columns["x1"].float() - x1).abs().flatten(1).amax(1)) if "x1" in columns else gap
    ).tolist()
