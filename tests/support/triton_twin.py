"""Triton's language on a CPU, in torch: kernels run from their own source where triton is not installed.

A program runs after the other, block by block, and a pointer is a flat storage with an offset for each number. Reading
or writing out of bounds raises. Only what flowmap's kernels use is here.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

PROGRAM = [0]


class Pointer:
    """Addresses of numbers in the storage of a tensor."""

    def __init__(self, memory: Tensor, offsets: Tensor | int):
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset) -> Pointer:
        return Pointer(self.memory, self.offsets + offset)


def pointer_to(x: Tensor) -> Pointer:
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return Pointer(memory, x.storage_offset())


def load(at: Pointer, mask: Tensor, other) -> Tensor:
    offsets, mask = torch.broadcast_tensors(at.offsets, mask)
    assert int(offsets[mask].amin()) >= 0 and int(offsets[mask].amax()) < len(at.memory)
    return torch.where(mask, at.memory[torch.where(mask, offsets, 0)], torch.as_tensor(other).to(at.memory.dtype))


def store(at: Pointer, value: Tensor, mask: Tensor) -> None:
    assert value.dtype == at.memory.dtype and int(at.offsets[mask].amax()) < len(at.memory)
    at.memory[at.offsets[mask]] = value[mask]


def dot(a: Tensor, b: Tensor, total: Tensor | None = None, *, input_precision: str) -> Tensor:
    """a @ b + total in float32, of blocks whose sides are powers of two from 16, as on a GPU."""
    assert a.dtype == b.dtype and input_precision in ("ieee", "tf32")
    assert all(n >= 16 and n & (n - 1) == 0 for n in (*a.shape, *b.shape))
    found = a.float() @ b.float()
    return found if total is None else total + found


def where(condition: Tensor, a, b) -> Tensor:
    return torch.where(condition, a, b)


LANGUAGE = {
    "constexpr": int,
    "program_id": lambda axis: PROGRAM[0],
    "cast": lambda number, dtype: number,
    "cdiv": lambda a, b: -(-a // b),
    "arange": torch.arange,
    "load": load,
    "store": store,
    "dot": dot,
    "where": where,
    "zeros": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    "max": torch.amax,
    "sum": torch.sum,
    "exp2": torch.exp2,
    "maximum": torch.maximum,
    "minimum": min,
    "float32": torch.float32,
    "int64": torch.int64,
}


class Kernel:
    """A function with @triton.jit: kernel[grid](...) runs it for every program of a grid of one dimension."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid: tuple[int]):
        def run(*args, num_warps: int, num_stages: int, **kwargs):
            for PROGRAM[0] in range(grid[0]):
                given = [pointer_to(x) if isinstance(x, Tensor) else x for x in args]
                self.function(*given, **kwargs)

        return run

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def twin_of(path: Path) -> ModuleType:
    """The module at that path, with this language for triton."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(language).update(LANGUAGE)
    vars(triton).update(
        language=language,
        jit=Kernel,
        cdiv=LANGUAGE["cdiv"],
        next_power_of_2=lambda n: next(p for p in (2**i for i in itertools.count()) if p >= n),
    )
    spec = importlib.util.spec_from_file_location("triton_twin_of_" + path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        spec.loader.exec_module(module)
    return module
