"""Arrow shards of a fixed number of samples each, in which encodings and pairs are stored: the reader and the format.

A folder has plan.json (what is being made), shard-00000.arrow with a .json of its contents, and at last index.json,
which marks it complete. flowmap/prepare/write.py writes them. index.json has the SHA-256 of each file (not in folders
of flowmap 0.1). checksums.py checks them when the folder is first opened or has changed, and with --verify of `encode`
and `pairs`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmap.data import checksums
from flowmap.data.sources import optional

INDEX, PLAN = "index.json", "plan.json"


@dataclass(frozen=True)
class Made:
    """The words of messages about such folders: the recipe's key, the thing, the verb that makes it, and the format
    number.
    """

    key: str
    thing: str
    verb: str
    format: int


def shard_name(number: int, suffix: str = ".arrow") -> str:
    return f"shard-{number:05d}{suffix}"


def read_index(folder: Path, made: Made) -> dict[str, Any]:
    """index.json of a complete folder. Raises ValueError with the progress of an incomplete one."""
    if not (folder / INDEX).is_file():
        done = len(list(folder.glob("shard-*.arrow")))
        state = f"is not complete ({done} shards are there)" if (folder / PLAN).is_file() else f"holds no {made.thing}"
        raise ValueError(f"{made.key}: {folder}: {state}; run `{made.verb}`")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: is not JSON: {error}") from error
    found = index.get("identity", {}).get("format") if isinstance(index, dict) else None
    if found != made.format:
        what = f"is of format {found}, of an older or newer version" if found else f"is no index of {made.thing}"
        raise ValueError(
            f"{folder / INDEX}: {what}; this one reads format {made.format}: `{made.verb}` makes it in another folder"
        )
    return index


def difference(there: Any, here: Any, key: str = "") -> str | None:
    """The first key with another value, and both values; None where all are equal."""
    if there == here:
        return None
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return f"{key}: {there!r} there, {here!r} here"
    names = dict.fromkeys((*there, *here))
    found = (difference(there.get(name), here.get(name), f"{key}.{name}" if key else name) for name in names)
    return next((one for one in found if one), None)


def check_sums(folder: Path, index: Mapping[str, Any], made: Made, *, again: bool = False) -> int:
    """How many files of the folder have a checksum in its index; ValueError names one that is missing, torn or damaged.

    again: read every file, also those that have not changed since they were last found right.
    """
    files = [*index["shards"], *index.get("files", [])]
    for one in files:
        check_size(folder, one, made)
    wanted = {one["file"]: one["sha256"] for one in files if "sha256" in one}
    checksums.check(folder, wanted, made.verb, again=again)
    return len(wanted)


def check_size(folder: Path, one: Mapping[str, Any], made: Made) -> None:
    path = folder / one["file"]
    size = os.path.getsize(path) if path.is_file() else None
    if size != one["bytes"]:
        state = "is missing" if size is None else f"is torn: it has {size} bytes, not {one['bytes']}"
        raise ValueError(f"{path}: {state}; `{made.verb}` makes it again")


def open_shards(folder: Path, shards: Sequence[Mapping[str, Any]], made: Made) -> Any:
    """The shards as one data set, mapped into memory, whose rows are Arrow tables; ValueError names one that is torn.

    `check_sums` comes first. The format is set once, here: `with_format` copies the table of all shards (100 ms for
    1,300 of them), too much for each batch. Columns that are not used cost nothing.
    """
    datasets = optional("datasets")
    tables = []
    for shard in shards:
        check_size(folder, shard, made)
        path = folder / shard["file"]
        try:
            tables.append(datasets.Dataset.from_file(str(path)))
        except Exception as error:  # Arrow's own errors, and those of datasets for a schema that it does not know
            raise ValueError(
                f"{path}: is torn: {' '.join(str(error).split())[:200]}; delete it and run `{made.verb}`"
            ) from error
        if len(tables[-1]) != shard["rows"]:
            raise ValueError(f"{path}: is torn: it has {len(tables[-1])} samples, not {shard['rows']}")
    return datasets.concatenate_datasets(tables).with_format("arrow")


def to_column(values: Tensor) -> Any:
    """(B, ...) as one Arrow column of fixed-size lists; bool becomes uint8."""
    pyarrow = optional("pyarrow")
    flat = (values.to(torch.uint8) if values.dtype == torch.bool else values).contiguous()
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.flatten().numpy()), max(flat[0].numel(), 1))


def from_column(table: Any, name: str, shape: Sequence[int]) -> Tensor:
    """The inverse: (B, *shape), in the dtype that was stored."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks]
    return torch.from_numpy(np.concatenate(parts)).view(-1, *shape)  # one copy: the chunks are views of the files


def to_trimmed_column(values: Tensor, mask: Tensor) -> Any:
    """(B, L, D) as one Arrow column of lists, without the positions where the mask (B, L) is False."""
    pyarrow = optional("pyarrow")
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]) * values.shape[2]
    flat = pyarrow.array(values[mask].flatten().numpy())
    return pyarrow.LargeListArray.from_arrays(pyarrow.array(ends.numpy()), flat)


def from_trimmed_column(table: Any, name: str, mask: Tensor, width: int) -> Tensor:
    """The inverse: (B, L, width), 0 where the mask (B, L) is False."""
    found = from_column(table, name, (width,))
    whole = torch.zeros(*mask.shape, width, dtype=found.dtype)
    whole[mask] = found
    return whole


def write_stream(path: Path, batches: Sequence[Any]) -> None:
    """An Arrow stream file of those record batches."""
    pyarrow = optional("pyarrow")
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
