"""Encode pictures into latents and text embeddings on disk, shard by shard.

After an interruption at any moment, a second call completes the folder. A shard is a fixed range of the source's
positions and a function of that range alone, so any process may make it, any number of times. data/encoded.py
describes the files.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import read_json, write_json, write_tensors
from flowmap.base.images import from_bytes
from flowmap.data.dataset import held_out_count
from flowmap.data.encoded import EMPTY, REFERENCE, Encoded
from flowmap.data.images import survey
from flowmap.data.live_text import on_device
from flowmap.data.shards import INDEX, PLAN, difference, shard_name
from flowmap.data.sources import Item, optional
from flowmap.plan.frozen_parts import check_frozen_parts
from flowmap.prepare.encode_shard import Shard
from flowmap.prepare.read_ahead import in_order, read_ahead
from flowmap.prepare.write import check_plan, making, measured, once, sweep_stale, whole, write_shard

# Held-out and reference samples of a stream come from this many times their number of first samples.
PREFIX = 4


def encode(
    spec: Encoded,
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    log: Callable[[str], None] | None = None,
    waiting: Callable[[], None] | None = None,
) -> dict[str, Any] | None:
    """Encode the data and return the contents of index.json, or None while other processes still make shards.

    shard (r, n): make the shards whose number is r modulo n. log: receives a description of the pictures before they
    are encoded, and of those skipped afterwards. waiting: as in only_process (base/files.py).

    Raises ValueError if the folder contains another encoding, or captions are read and no picture has one. WriteError
    names a shard that could not be written; earlier shards remain.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} must be 1 or more")
    optional("pyarrow")
    log = log or (lambda message: None)
    survey.check_captions(spec.images, spec.text is not None)
    with making(folder, shard, waiting):
        encoder, what = Encoder(spec, device), _plan(spec)
        if not (folder / PLAN).is_file():
            check_frozen_parts(spec)
            encoder.load()  # before anything is written
        check_plan(folder, what, "encoding", ("length", "fingerprint"))
        if not (folder / INDEX).is_file():
            _log_each(log, survey.describe_source(spec.images, spec.text is not None))
        _fill(spec, folder, encoder, *shard, batch_size)
    shards = _all_shards(spec, folder)
    index = None if shards is None else _finish(spec, folder, encoder, shards, log)
    _log_each(log, [] if index is None else survey.describe_index(index))
    return index


def _log_each(log: Callable[[str], None], lines: list[str]) -> None:
    for line in lines:
        log(line)


PIXELS_AT_ONCE = 1 << 23  # 32 pictures of 512 x 512: an autoencoder holds some kilobytes of each pixel


class Encoder:
    """Encode pictures and captions into the columns of a shard; networks are loaded when they are first needed."""

    def __init__(self, spec: Encoded, device: torch.device | str):
        self.spec, self.device = spec, device

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Return columns for uint8 images (B, C, H, W): "x0", "mirrored", "cond_text" ...

        Each is (B, ...) float16, uint8 or bool.
        """
        columns = {"x0": self._latents(images)}
        if self.spec.flip:
            columns["mirrored"] = self._latents(images.flip(-1))
        if self.spec.stored_text == "captions":  # every shard has them
            return columns
        return columns | {f"cond_{name}": value for name, value in self.text(captions).items()}

    def load(self) -> None:
        """Load the networks now. Raise ValueError if one is not available."""
        if self.spec.autoencoder is not None:
            self._autoencoder  # noqa: B018
        if self.spec.text is not None:
            self.text([""])

    @torch.no_grad()
    def text(self, captions: list[str]) -> dict[str, Tensor]:
        """The text conditions of the captions, as they will be read again."""
        if self.spec.text is None:
            return {}
        found = {name: _compact(value) for name, value in self._text(captions).items()}
        if self.spec.stored_text == "trimmed":
            if not {"text", "text_mask"} <= set(found):
                has = ", ".join(found)
                raise ValueError(f"data.stored_text: 'trimmed' wants an encoder with a text_mask, this one has {has}")
            found["text"] = found["text"] * found["text_mask"].unsqueeze(-1)
        return found

    def _latents(self, images: Tensor) -> Tensor:
        if self.spec.autoencoder is None:
            return images
        at_once = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
        parts = (self._autoencoder.encode(from_bytes(part.to(self.device))) for part in images.split(at_once))
        return torch.cat([_compact(part) for part in parts])

    @cached_property
    def _autoencoder(self) -> Any:
        assert self.spec.autoencoder is not None
        return on_device(self.spec.autoencoder.load(), self.device)

    @cached_property
    def _text(self) -> Any:
        assert self.spec.text is not None
        return on_device(self.spec.text.load(), self.device)


def _compact(value: Tensor) -> Tensor:
    return value.half().cpu() if value.is_floating_point() else value.bool().cpu()


def _plan(spec: Encoded) -> dict[str, Any]:
    """Return what is being made, and the number of pictures."""
    images = spec.images
    return {
        "identity": spec.identity(),
        "shard_items": spec.shard_items,
        "length": images.length(),
        "fingerprint": images.fingerprint(),
    }


def _fill(spec: Encoded, folder: Path, encoder: Encoder, rank: int, world: int, batch_size: int) -> None:
    from tqdm import tqdm

    length = spec.images.length()
    numbers = count(rank, world) if length is None else range(rank, -(-length // spec.shard_items), world)
    total = (
        None if length is None else sum(min(spec.shard_items, length - number * spec.shard_items) for number in numbers)
    )
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="image", desc="encode") as bar:
        for number in numbers:
            made = whole(folder, number) or _make(spec, folder, encoder, number, batch_size)
            bar.update(made["positions"])
            if made["positions"] < spec.shard_items:  # The source ends here.
                return


def _make(spec: Encoded, folder: Path, encoder: Encoder, number: int, batch_size: int) -> dict[str, Any]:
    """Encode one shard in memory, then write its summary (.json) and the shard."""
    start = number * spec.shard_items
    settings = {"wants_text": spec.text is not None, "trimmed": spec.stored_text == "trimmed"}
    shard = Shard(encoder, start, spec.images.num_classes(), **settings)
    for batch in read_ahead(spec.images, start, start + spec.shard_items, batch_size):
        shard.add(batch)
    length = spec.images.length()
    if length is not None and shard.positions != min(spec.shard_items, length - start):
        path = folder / shard_name(number)
        raise RuntimeError(
            f"{path}: the source gave {shard.positions} items from position {start}; it has changed while it was read"
        )
    return write_shard(folder, number, shard.write, shard.summary())


def _all_shards(spec: Encoded, folder: Path) -> list[dict[str, Any]] | None:
    """Return the summaries of all shards of the encoding, in order; None if one is missing."""
    length = spec.images.length()
    shards: list[dict[str, Any]] = []
    while length is None or len(shards) * spec.shard_items < length:
        summary = whole(folder, len(shards))
        if summary is None:
            return None
        shards.append({"file": shard_name(len(shards)), **summary})
        if length is None and summary["positions"] < spec.shard_items:
            break
    return shards


def _finish(
    spec: Encoded, folder: Path, encoder: Encoder, shards: list[dict[str, Any]], log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Write what is common to all shards, index.json last, and return it; None if another process does so now.

    The same shards give the same bytes.
    """

    def finish() -> dict[str, Any]:
        index = _index(spec, shards)
        _write_common(spec, folder, encoder, index, shards, log)
        return index

    return once(folder, finish)


def _write_common(
    spec: Encoded,
    folder: Path,
    encoder: Encoder,
    index: dict[str, Any],
    shards: list[dict[str, Any]],
    log: Callable[[str], None],
) -> None:
    there = [folder / name for name in (INDEX, REFERENCE, *([EMPTY] if spec.text is not None else []))]
    if (
        all(path.is_file() for path in there)
        and {key: value for key, value in read_json(folder / INDEX).items() if key != "files"} == index
    ):
        return
    sweep_stale(folder, (PLAN, EMPTY, REFERENCE, INDEX))
    (folder / INDEX).unlink(missing_ok=True)
    if spec.text is not None:
        write_tensors(folder / EMPTY, encoder.text([""]))
    log("reading the pictures that metrics compare with")
    write_tensors(folder / REFERENCE, _reference(spec, folder, shards))
    index["files"] = [{"file": path.name, **measured(path)} for path in there if path.name != INDEX]
    write_json(folder / INDEX, index)


def _index(spec: Encoded, shards: list[dict[str, Any]]) -> dict[str, Any]:
    filled = [shard for shard in shards if shard["rows"]]
    left_out = [one for shard in shards for one in shard["left_out"]]
    rows = sum(shard["rows"] for shard in shards)
    if rows <= (held_out := held_out_count(spec.held_out, rows)):
        first = f"; {left_out[0][0]} {left_out[0][1]}" if left_out else ""
        raise ValueError(
            f"data.held_out: {held_out} leaves nothing of {rows} usable pictures ({len(left_out)} left out{first})"
        )
    if spec.text is not None and sum(shard["missing_captions"] for shard in shards) == rows:
        none = f"the recipe reads captions and none of {rows} usable pictures has one"
        raise ValueError(f"data.text: {none}: {spec.images.captions_hint}")
    columns = filled[0]["columns"]
    for shard in filled:
        found = difference(columns, shard["columns"])
        if found:
            raise ValueError(f"{shard['file']}: its samples differ from those of {filled[0]['file']}: {found}")
    labels = [shard["max_label"] for shard in filled if shard["max_label"] is not None]
    mean, std = _moments(filled)
    return {
        "identity": spec.identity(),
        "chosen": spec.chosen(),
        "shards": [
            {key: shard[key] for key in ("file", "rows", "bytes", "sha256") if key in shard} for shard in shards
        ],
        "rows": rows,
        "left_out": left_out,
        "skipped": spec.images.skipped(),
        **{key: sum(shard[key] for shard in shards) for key in ("grey", "missing_captions", "unlabelled")},
        "shape": columns["x0"]["shape"],
        "columns": columns,
        "num_classes": spec.images.num_classes() or (max(labels) + 1 if labels else None),
        "class_names": spec.images.class_names(),
        "class_rows": _class_rows(filled),
        "mean": mean,
        "std": std,
    }


def _class_rows(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of samples of each class, by its number."""
    found = sum((Counter(shard["class_rows"]) for shard in shards), Counter())
    return {label: found[label] for label in sorted(found, key=int)}


def _moments(shards: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of x0."""
    count = sum(shard["values"] for shard in shards)
    first, second = (
        torch.tensor([shard[key] for shard in shards], dtype=torch.float64).sum(0) / count for key in ("sum", "squares")
    )
    return first.tolist(), (second - first**2).clamp(min=0).sqrt().tolist()


def _reference(spec: Encoded, folder: Path, shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the pictures of held-out and of reference samples, uint8, and their rows."""
    positions = torch.cat([_positions(folder / shard["file"]) for shard in shards if shard["rows"]])
    held_out = held_out_count(spec.held_out, len(positions))
    wanted = held_out + spec.reference_images
    among = len(positions) if spec.images.length() is not None else min(len(positions), PREFIX * wanted)
    order = torch.randperm(among, generator=torch.Generator().manual_seed(spec.seed))
    out, kept = order[:held_out].sort().values, order[held_out:wanted].sort().values
    rows = torch.cat([out, kept])
    place = {position: i for i, position in enumerate(positions[rows].tolist())}
    pictures = torch.empty(len(rows), spec.images.channels, spec.images.size, spec.images.size, dtype=torch.uint8)
    for position, item in _at(spec, sorted(place)):
        if item.image is None:
            raise ValueError(f"{item.key}: could be read before and now {item.problem}: the source has changed")
        pictures[place[position]] = item.image
    return {
        "held_out": pictures[: len(out)],
        "reference": pictures[len(out) :],
        "held_out_rows": out,
        "reference_rows": kept,
    }


def _at(spec: Encoded, positions: list[int]) -> Iterator[tuple[int, Item]]:
    if spec.images.length() is not None:
        read = lambda position: next(spec.images.items(position, position + 1))
        yield from zip(positions, in_order(read, positions), strict=True)
        return
    wanted = set(positions)
    for position, item in enumerate(spec.images.items(0, positions[-1] + 1)):
        if position in wanted:
            yield position, item


def _positions(path: Path) -> Tensor:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
        return torch.from_numpy(table["position"].to_numpy().copy())
