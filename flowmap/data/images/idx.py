"""Fashion-MNIST's four gzipped IDX files: their places, their contents, and how to read them.

An IDX file: four bytes (0, 0, 8 = unsigned byte, number of dimensions), each dimension as a big-endian int32, then the
bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist installs
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": (60_000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60_000,),
    "t10k-images-idx3-ubyte.gz": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10_000,),
}


def parse(content: bytes, shape: tuple[int, ...], path: str | Path) -> Tensor:
    """The uint8 tensor of this shape in an uncompressed IDX file.

    Raises ValueError that names `path` if header or length differ.
    """
    header = struct.pack(f">BBBB{len(shape)}i", 0, 0, 8, len(shape), *shape)
    size = len(header) + torch.Size(shape).numel()
    if content[: len(header)] != header or len(content) != size:
        raise ValueError(f"{path} is not an IDX file of {size} bytes and shape {shape}: delete it and run `make data`")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).reshape(shape)


def read(folder: Path, name: str) -> Tensor:
    """One of FASHION_FILES as a uint8 tensor, with its checksum, header and length checked.

    Raises ValueError for a broken file.
    """
    path = folder / name
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and run `make data`") from error
    return parse(content, FASHION_FILES[name], path)


def complete(folder: Path) -> bool:
    """Whether the folder has all four files, each whole."""
    try:
        return all(read(folder, name) is not None for name in FASHION_FILES)
    except ValueError:
        return False
