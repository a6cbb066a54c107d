"""Checks that a folder of diffusers or transformers has complete safetensors files, without reading the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STEMS = ("diffusion_pytorch_model", "model")
VARIANT = re.compile(rf"({'|'.join(STEMS)})\.(\w+)(-\d+-of-\d+)?\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_weight_files(folder: Path) -> None:
    """Raise a one-line ValueError that names a missing or truncated file, a pickle or a file of another variant."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _check_shards(index)
        if (plain := folder / f"{stem}.safetensors").is_file():
            return _check_whole(plain)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if match := VARIANT.match(name):
            wanted = name.replace(f".{match[2]}", "", 1)
            variant = f"is of the variant {match[2]!r}, which is not read"
            raise ValueError(f"{folder}: {name} {variant}: save it as {wanted} too")
    pickles = [name for name in names if name.endswith(PICKLES)]
    found = f"; {pickles[0]} is a pickle and is not read" if pickles else ""
    raise ValueError(f"{folder}: there is no *.safetensors{found}")


def stored_in_bfloat16(folder: Path) -> bool:
    """Whether a folder has safetensors files whose floating-point tensors are all in bfloat16; reads headers alone."""
    found: set[str] = set()
    for stem in STEMS:
        files = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-?????-of-?????.safetensors")]
        for file in files:
            found |= {entry["dtype"] for name, entry in _header(file)[1].items() if name != "__metadata__"}
    return {dtype for dtype in found if "F" in dtype} == {"BF16"}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(its length, its entries), empty if it is longer than the file."""
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return length, json.loads(handle.read(length)) if length <= path.stat().st_size else {}


def _check_shards(index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of safetensors") from error
    for name in shards:
        if not (index.parent / str(name)).is_file():
            what = f"is missing, one of the {len(shards)} files that {index.name} names"
            raise ValueError(f"{index.parent}: {name} {what}")
        _check_whole(index.parent / str(name))


def _check_whole(path: Path) -> None:
    """Raise unless the file has the length in its header: 8 bytes with the header's length, the header, the tensors."""
    size = path.stat().st_size
    try:
        length, tensors = _header(path)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: is not a whole safetensors file ({size} bytes)")
