"""Whether a folder of diffusers' or transformers' has the safetensors that loading it reads, told without reading them."""

from __future__ import annotations

import json
import re
from pathlib import Path

STEMS = ("diffusion_pytorch_model", "model")
VARIANT = re.compile(rf"({'|'.join(STEMS)})\.(\w+)(-\d+-of-\d+)?\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_weight_files(folder: Path) -> None:
    """ValueError, in one line, that names the file that is missing or torn, or what is there in its place (pickles, another variant)."""
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
            raise ValueError(
                f"{folder}: {name} is of the variant {match[2]!r}, which is not read: save it as {wanted} too"
            )
    pickles = [name for name in names if name.endswith(PICKLES)]
    raise ValueError(
        f"{folder}: there is no *.safetensors" + (f"; {pickles[0]} is a pickle and is not read" if pickles else "")
    )


def _check_shards(index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of safetensors") from error
    for name in shards:
        if not (index.parent / str(name)).is_file():
            raise ValueError(
                f"{index.parent}: {name} is missing, one of the {len(shards)} files that {index.name} names"
            )
        _check_whole(index.parent / str(name))


def _check_whole(path: Path) -> None:
    """A safetensors file says in its header how long it is: 8 bytes with the header's length, the header, the tensors."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            tensors = json.loads(handle.read(length)) if length <= size else {}
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: is not a whole safetensors file ({size} bytes)")
