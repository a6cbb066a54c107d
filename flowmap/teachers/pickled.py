"""Reads tensors from NVIDIA's pickles (EDM, EDM2) without executing their code.

A pickle is a program. This reader accepts only what such files consist of (plain containers, tensors and their
storages, module objects as inert records) and refuses anything else by name. It imports nothing that the file names,
and never calls torch.load. Sizes that a file declares are checked against its actual bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MOST_NESTED = 64  # nested modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Record:
    """An object of a class that is not imported: its class name and its state, a plain mapping."""

    def __init__(self, name: str = "", state: dict | None = None):
        self.name, self.state = name, state or {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle: plain containers, tensors and Records. One-line ValueError for anything else."""
    try:
        with open(path, "rb") as file:
            return _Reader(file, str(path)).load()
    except ValueError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        RuntimeError,
        MemoryError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: is not a whole pickle of the known kind: {reason}") from error


def tensors_of(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and buffers of a module's Record, by their dotted names."""
    if not isinstance(module, Record):
        raise ValueError(f"{prefix or 'the object'}: is {type(module).__name__}, not a module")
    if prefix.count(".") > MOST_NESTED:
        raise ValueError(f"{prefix[:80]}...: its modules lie in one another more than {MOST_NESTED} deep")
    parts = {part: module.state.get(part) or {} for part in ("_parameters", "_buffers", "_modules")}
    for part, inside in parts.items():
        if not isinstance(inside, dict) or not all(isinstance(name, str) for name in inside):
            raise ValueError(f"{prefix or 'the object'}: its {part} is no mapping from names")
    held = parts["_parameters"] | parts["_buffers"]
    found = {prefix + name: value for name, value in held.items() if isinstance(value, Tensor)}
    for name, child in parts["_modules"].items():
        if child is not None:
            found |= tensors_of(child, f"{prefix}{name}.")
    return found


class _Reader(pickle._Unpickler):  # the Python version: its memo is a dict, so a huge index allocates nothing
    """An unpickler that resolves only the names in ADMITTED."""

    def __init__(self, file, path: str):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module.startswith("torch.nn.modules."):
            return type(name, (Record,), {})
        what = "which is neither a tensor nor a plain container; nothing was executed"
        raise ValueError(f"{self.path}: holds {module}.{name}, {what}")

    def persistent_load(self, key: Any) -> Any:
        raise ValueError(f"{self.path}: refers to data outside of itself; nothing was executed")


class _StorageReader(_Reader):
    """A reader for one storage in torch's legacy format: its type and length, then its bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, key: Any) -> tuple[torch.dtype, int]:
        kind, dtype, _, _, count = key[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise ValueError(f"{self.path}: a storage of an unknown kind")
        return dtype, count


def _storage(data: bytes) -> Tensor:
    """The numbers (N,) of a storage."""
    file = io.BytesIO(data)
    read = lambda: _StorageReader(file, "a storage").load()
    if read() != LEGACY_MAGIC:
        raise ValueError("a storage is not in torch's older format")
    read(), read()  # protocol, system
    dtype, count = read()
    read()  # keys
    stored, size = int.from_bytes(file.read(8), "little"), torch.empty((), dtype=dtype).element_size()
    if stored != count or count < 0 or len(data) - file.tell() != count * size:
        raise ValueError(f"a storage declares {count} numbers of {size} bytes and has {len(data) - file.tell()} bytes")
    return torch.frombuffer(bytearray(file.read()), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *unused) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} in a storage of {storage.numel()} numbers")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()


def _persistent(meta: dict) -> Record:
    """An object of torch_utils.persistence, which pickles a class's source code with its state: ignore the source."""
    return Record(str(meta.get("class_name", "")), dict(meta.get("state") or {}))


def _number(*unused) -> Record:
    """A NumPy scalar or dtype, ignored: the shapes of the weights define these settings as well."""
    return Record("numpy")


class _Dict(dict):
    """dnnlib.util.EasyDict, without its attributes."""

    def __setstate__(self, state: Any) -> None: ...


ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *unused: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): tuple,
    ("numpy", "dtype"): _number,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
