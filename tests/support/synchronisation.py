"""Finds where the host waits for a device, on a machine without one: the meta device stands in for it."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    packet
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount")
    if (packet := getattr(aten, name, None)) is not None
}
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MADE = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


def on_meta(values) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "meta" for value in values)


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (what := self._waits(func._overloadpacket, args, kwargs)) is not None:
            self.found.append(f"{what}: {where()}")
        return func(*args, **kwargs)

    def _waits(self, packet, args, kwargs) -> str | None:
        if packet in WAITS and on_meta(args):
            return str(packet)
        if packet in INDEXED and on_meta(args[:1]):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or index.device.type == "cpu" for index in indices):
                return f"{packet} by a mask or by an index of the CPU"
        if packet in COPIES:
            source = args[1] if packet is aten.copy_ else args[0]
            into = args[0].device if packet is aten.copy_ else kwargs.get("device") or source.device
            free = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
            if source.device.type != torch.device(into).type and not free:
                return f"copy from {source.device} to {into}"
        return None


class _Made(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = args[1:] if func is Tensor.new_tensor else args
        if func in MADE and on_meta([out]) and not on_meta(tree_leaves(given)):
            self.found.append(f"{func.__name__} on the device: {where()}")
        return out


def where() -> str:
    """The innermost line of flowmap that is being executed."""
    lines = [frame for frame in traceback.extract_stack() if "/flowmap/" in frame.filename]
    return f"{lines[-1].filename.rpartition('/flowmap/')[2]}:{lines[-1].lineno} {lines[-1].line}" if lines else "a test"


class Synchronisations:
    """A context; `found` are the operations in it for which the host would wait for a device."""

    def __init__(self):
        self.found: list[str] = []

    def __enter__(self) -> list[str]:
        self._modes = _Dispatched(self.found), _Made(self.found)
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
