"""How fast are samples read: from many shards, for a node, from a folder of pictures, with text, in a new order?

Folders of the real format with random contents are written to a temporary folder and read from the page cache: this is
the cost of the host, not of a disk. Ratios are of one run, whose ways take turns.
`python benchmarks/loader.py [--shards 1300] [--rounds 15] [--only-workers | --only-order]`
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow
import torch
from lib.report import RESULTS, environment, table, write
from torch.utils.data import DataLoader

from flowmap.base.files import write_json, write_tensors
from flowmap.data import Dataset, PairedDataset, StepBatches, as_it_is
from flowmap.data.dataset import full_precision
from flowmap.data.encoded import EMPTY, FORMAT, REFERENCE, EncodedDataset
from flowmap.data.images.folder import FolderImages
from flowmap.data.order import BLOCK, ORDERS, WINDOW
from flowmap.data.pairs import contents
from flowmap.data.shards import INDEX, shard_name, to_column, to_trimmed_column, write_stream
from flowmap.prepare.read_ahead import in_order
from flowmap.recipe import read_recipe
from flowmap.train.loading import loader_of

CAPTION = "a photograph of a red bicycle that leans against a white wall in the morning sun, with long shadows"  # 100
TOKENS = 30  # of such a caption, of which longer ones have more
CPU = torch.device("cpu")
NODE = ["workers", "latents a CPU second", "latents a second (median)", "most"]
ORDER = ["samples", "shuffle", "MiB held", "seconds to the first batch", "microseconds a batch"]
COLD = ["shuffle", "samples read", "KiB of a sample", "KiB read from the disk for each", "samples a second"]
PICTURES = ["way", "CPU ms a picture", "pictures a second (fastest round)", "plain loop's CPU time / its own"]
# Per recipe: shape of a latent, text conditions, and what 8 H100 use in a second: 8 x micro-batch / the step's time by
# the roofline count of the full-scale audit; None where it counted none.
RECIPES: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]], float | None]] = {
    "imagenet512": ((4, 64, 64), {}, 8 * 64 / 0.352),
    "dit256": ((4, 32, 32), {}, None),
    "sd15": ((4, 64, 64), {"text": (77, 768)}, 8 * 16 / 0.313),
    "sd35-medium": ((16, 64, 64), {"text": (154, 4096), "pooled": (2048,)}, 8 * 8 / 0.491),
    "flux-dev-lora": ((16, 64, 64), {"text": (256, 4096), "pooled": (768,)}, 8 * 4 / 1.777),
    "sana": ((32, 32, 32), {"text": (300, 2304), "text_mask": (300,)}, None),
}


def loader_rates(path: Path = RESULTS / "loader.json") -> dict[str, dict[str, float | None]]:
    """For benchmarks/node.py: recipe -> samples a second that 8 GPUs use ("need") and one core reads ("measured")."""
    return json.loads(path.read_text())["recipes"] if path.is_file() else {}


def columns_of(shape: tuple[int, ...], text: dict[str, tuple[int, ...]], stored: str, rows: int) -> dict[str, Any]:
    """Arrow columns of `rows` samples, and under "columns" their entry in index.json."""
    values = {"x0": torch.randn(rows, *shape).half()}
    if stored != "captions":
        values |= {f"cond_{name}": torch.randn(rows, *one).half() for name, one in text.items()}
    if "cond_text_mask" in values:
        values["cond_text_mask"] = torch.arange(text["text_mask"][0]).expand(rows, -1) < TOKENS
    known = {
        name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
        for name, value in values.items()
    }
    arrays = {name: to_column(value) for name, value in values.items()}
    if stored == "trimmed":
        arrays["cond_text"] = to_trimmed_column(values["cond_text"], values["cond_text_mask"])
    arrays |= {"label": pyarrow.array([i % 10 for i in range(rows)]), "caption": pyarrow.array([CAPTION] * rows)}
    return {"arrays": arrays, "columns": known}


def write_shards(folder: Path, arrays: dict[str, Any], shards: int, **more: Any) -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    written = []
    for number in range(shards):
        path = folder / shard_name(number)
        write_stream(path, [pyarrow.record_batch(arrays)])
        rows = len(next(iter(arrays.values())))
        written.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size, **more})
    return written


def encoding(folder: Path, shape, text, *, stored: str = "padded", shards: int, rows: int = 32) -> EncodedDataset:
    """A finished encoding of random samples, opened."""
    made = columns_of(shape, text, stored, rows)
    written = write_shards(folder, made["arrays"], shards)
    none = torch.zeros(0, dtype=torch.int64)
    pictures = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    reference = {"held_out": pictures, "reference": pictures, "held_out_rows": none, "reference_rows": none}
    write_tensors(folder / REFERENCE, reference)
    write_tensors(folder / EMPTY, {name: torch.zeros(1, *one) for name, one in text.items()})
    write_json(folder / INDEX, {
        "identity": {"format": FORMAT}, "chosen": {}, "shards": written, "shape": list(shape), "num_classes": 10,
        "columns": made["columns"],
    })  # fmt: skip
    settings = {"identity": lambda: {"format": FORMAT}, "chosen": dict, "flip": False, "stored_text": stored}
    spec: Any = SimpleNamespace(**settings, text=SimpleNamespace(load=lambda: None))
    return EncodedDataset(spec, folder)


def pairs(folder: Path, shape: tuple[int, ...], shards: int) -> PairedDataset:
    """Pairs of random samples, opened."""
    data = Dataset("random", torch.randn(64, *shape), torch.zeros(0, *shape))
    rows = 32
    arrays = {"x0": to_column(torch.randn(rows, *shape).half())}
    arrays |= {name: pyarrow.array([0] * rows) for name in ("label", "place")}
    identity = {"format": 1, "seed": 0}
    written = write_shards(folder, arrays, shards, inverted=False)
    write_json(folder / INDEX, {"identity": identity, "contents": contents(data, 0), "shards": written})
    return PairedDataset(folder, data, identity)


def seconds(ways: dict[str, Callable[[list[int]], Any]], rows: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of each way for random batches; the ways take turns, and the first two rounds are not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    batches = StepBatches(rows, batch, seed=0)
    for i in range(rounds + 2):
        for name, way in ways.items():
            places = batches.indices(i)
            started = time.perf_counter()
            way(places)
            if i >= 2:
                found[name].append(time.perf_counter() - started)
    return found


def many_shards(folder: Path, shards: int, rounds: int) -> list[list]:
    """Rows [what, shards, ms with the table copied, ms with it kept, ratio] for batches of 64."""
    rows = []
    shape = (4, 64, 64)
    for what, data in (
        ("latents", encoding(folder / "latents", shape, {}, shards=shards)),
        ("pairs", pairs(folder / "pairs", (4, 16, 16), shards)),
    ):
        name = "_table" if what == "latents" else "_generated"

        def copied(places: list[int], data: Any = data, name: str = name) -> None:
            setattr(data, name, getattr(data, name).with_format("arrow"))
            data.stored_batch(places)

        found = seconds({"copied": copied, "kept": data.stored_batch}, len(data), 64, rounds)
        old, new = (1e3 * statistics.median(times) for times in found.values())
        rows.append([what, shards, old, new, old / new])
    return rows


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Whole:
    """Whole batches for the processes of torch's DataLoader, the way that threads are compared with."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, places: list[int]) -> Any:
        return self.data.stored_batch(places)


def node_rate(folder: Path, shards: int, rounds: int) -> list[list]:
    """Rows [workers, latents a CPU second, a second: median and most] of 4 x 64 x 64, float32; the ways take turns."""
    data = encoding(folder / "node", (4, 64, 64), {}, shards=shards)

    def threads(workers: int) -> Any:
        recipe = read_recipe("digits", [f"trainer.workers={workers}", "data.batch_size=64"])
        return loader_of(recipe, data, StepBatches(len(data), 64, seed=0), CPU)

    def processes(workers: int) -> Any:
        batches: Any = StepBatches(len(data), 64, seed=0)
        return DataLoader(cast(Any, Whole(data)), batch_sampler=batches, collate_fn=as_it_is, num_workers=workers)

    ways = {"none": partial(threads, 0), "1 thread": partial(threads, 1), "2 threads": partial(threads, 2)}
    ways |= {"1 process": partial(processes, 1), "2 processes": partial(processes, 2)}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(5):
        for way, made in ways.items():
            found[way].append(node_round(made(), 4 * rounds))
    return [
        [way, *(statistics.median(one) for one in zip(*times, strict=True)), max(rate for _, rate in times)]
        for way, times in found.items()
    ]


def node_round(loader: Any, count: int) -> tuple[float, float]:
    """Latents a CPU second of all processes, the start of the workers included, and a second without it."""
    spent, batches = cpu_seconds(), iter(loader)
    for _ in range(4):  # more than the workers have ready
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        full_precision(next(batches)[0])
    rate = 64 * count / (time.perf_counter() - started)
    del batches  # waits for the workers
    return 64 * (count + 4) / (cpu_seconds() - spent), rate


def by_recipe(folder: Path, rounds: int) -> tuple[list[list], dict[str, dict[str, float | None]]]:
    """Rows [recipe, bytes of text padded, trimmed, captions, samples a second on one core padded, captions, need]."""
    rows, rates = [], {}
    for name, (shape, text, need) in RECIPES.items():
        batch = int(read_recipe(name, ["data.images.root=x"] if name != "imagenet512" else []).data.batch_size)
        speed = {}
        for stored in ("padded", "captions") if text else ("padded",):
            data = encoding(folder / f"{name}-{stored}", shape, text, stored=stored, shards=8)
            read = data.stored_batch if stored == "captions" else data.__getitems__
            found = seconds({stored: read}, len(data), batch, rounds)
            speed[stored] = batch / statistics.median(found[stored])
        wide = sum(2 * torch.Size(one).numel() for key, one in text.items() if key != "text_mask")
        mask = text.get("text_mask", (0,))[0]
        trimmed = 2 * TOKENS * text["text"][1] + mask if mask else None
        rows.append([
            name, wide + mask if text else None, trimmed, len(CAPTION) if text else None,
            speed["padded"], speed.get("captions"), need,
        ])  # fmt: skip
        rates[name] = {"need": need, "measured": speed["padded"], "measured_captions": speed.get("captions")}
    return [["" if cell is None else cell for cell in row] for row in rows], rates


def folder_rate(folder: Path, rounds: int, size: int = 512, count: int = 32) -> list[list]:
    """Rows [way, CPU ms a picture, pictures a second, CPU time of a plain loop with PIL / that of the way].

    JPEGs of 1024 x 768 are scaled to size. On a shared machine a second thread may gain nothing; CPU time is fair.
    """
    import numpy
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        noise = numpy.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=numpy.uint8)
        Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg", quality=90)
    source = FolderImages(size=size, root=str(folder))
    paths = sorted(folder.glob("*.jpg"))

    def plain(path: Path) -> Any:
        with Image.open(path) as image:
            box = (128, 0, 896, 768)
            return numpy.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box, 3.0))

    read = lambda at: list(source.items(at, at + 4))
    pooled = lambda threads: lambda: list(in_order(read, range(0, count, 4), threads))
    with ThreadPoolExecutor(2) as pool:
        ways = {
            "PIL, a plain loop": lambda: [plain(path) for path in paths],
            "PIL in 2 threads": lambda: list(pool.map(plain, paths)),
            "flowmap encode, 1 thread": pooled(1),
            "flowmap encode, 2 threads": pooled(2),
        }
        rows = []
        for name, way in ways.items():
            walls, costs = [], []
            for _ in range(max(3, rounds // 3)):
                spent, started = cpu_seconds(), time.perf_counter()
                way()
                walls.append(time.perf_counter() - started)
                costs.append(1e3 * (cpu_seconds() - spent) / count)
            rows.append([name, min(costs), count / min(walls)])
    return [[*row, rows[0][1] / row[1]] for row in rows]


def order_cost() -> list[list]:
    """Rows [samples, shuffle, MiB that are held, seconds to the first batch of 64, microseconds of the next ones]."""
    rows = []
    for samples, shuffle in itertools.product((1_281_167, 5_000_000, 100_000_000), ORDERS):
        batches = StepBatches(samples, 64, seed=0, shuffle=shuffle)
        started = time.perf_counter()
        batches.indices(0)
        drawn = time.perf_counter() - started
        started = time.perf_counter()
        for step in range(1, 513):  # more than a window
            batches.indices(step)
        held = sum(one.nbytes for one in vars(batches._order).values() if isinstance(one, torch.Tensor))
        rows.append([samples, shuffle, held / 2**20, drawn, 1e6 * (time.perf_counter() - started) / 512])
    return rows


def cold_reads(folder: Path, shards: int = 64, rows: int = 512, shape: tuple[int, ...] = (4, 64, 64)) -> list[list]:
    """Rows [shuffle, samples read, KiB of a sample, KiB read from the disk for each, samples a second] of files that
    are not in the page cache. With "global" few samples are read, so that the cache helps as little as with data that
    are larger than memory; with "blocks" a window.
    """
    found = []
    for shuffle, count in (("global", shards * rows // 16), ("blocks", BLOCK * WINDOW)):
        data = encoding(folder / shuffle, shape, {}, shards=shards, rows=rows)
        for file in sorted((folder / shuffle).iterdir()):
            with open(file, "rb") as content:
                os.fsync(content.fileno())
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        batches = StepBatches(len(data), 64, seed=0, shuffle=shuffle)
        before, started = disk_bytes(), time.perf_counter()
        for step in range(count // 64):
            data.stored_batch(batches.indices(step))
        read, spent = disk_bytes() - before, time.perf_counter() - started
        size = data.index["shards"][0]["bytes"] / rows
        found.append([shuffle, count, size / 1024, read / count / 1024, count / spent])
    return found


def disk_bytes() -> int:
    """The bytes that this process has read from a disk, not from the page cache (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1300)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="loader")
    parser.add_argument("--only-workers", action="store_true", help="the table of workers: loader_workers.json")
    parser.add_argument("--only-order", action="store_true", help="the tables of data.shuffle: loader_order.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.only_workers:
            rows = node_rate(folder, min(a.shards, 200), a.rounds)
            return write_tables("loader_workers", {"node": (NODE, rows)}, a, {"load": os.getloadavg()[0]})
        if a.only_order:
            tables = {"order": (ORDER, order_cost()), "cold": (COLD, cold_reads(folder))}
            return write_tables("loader_order", tables, a, {"load": os.getloadavg()[0]})
        recipes, rates = by_recipe(folder / "recipes", a.rounds)
        tables = {
            "shards": (
                ["batches of 64", "shards", "ms, table copied", "ms, table kept", "ratio"],
                many_shards(folder / "many", a.shards, a.rounds),
            ),
            "recipes": (
                ["recipe", "bytes of text, padded", "trimmed", "captions", "samples a second on one core",
                 "with captions", "8 GPUs use"],
                recipes,
            ),
            "pictures": (PICTURES, folder_rate(folder / "jpg", a.rounds)),
        }  # fmt: skip
    setting = {"caption_characters": len(CAPTION), "caption_tokens": TOKENS, "load": os.getloadavg()[0]}
    write_tables(a.name, tables, a, setting, recipes=rates)


def write_tables(name: str, tables: dict[str, Any], a: argparse.Namespace, setting: dict, **more: Any) -> None:
    for columns, rows in tables.values():
        print(table(rows, columns), "\n")
    write(name, {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "setting": {"shards": a.shards, "rounds": a.rounds, "batch": 64, **setting},
        **more,
        "tables": {key: {"columns": columns, "rows": rows} for key, (columns, rows) in tables.items()},
    })  # fmt: skip


if __name__ == "__main__":
    main()
