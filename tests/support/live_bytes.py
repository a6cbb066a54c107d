"""The bytes of tensors that are alive at once while a function runs."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the largest sum of the bytes of tensors that were made there and are alive."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # a view is of a storage that it was given: counted already, or made before
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            key = one.untyped_storage()._cdata if isinstance(one, Tensor) else None
            if key is not None and key not in self.sizes and key not in given:
                self.sizes[key] = one.untyped_storage().nbytes()
                self.now += self.sizes[key]
                weakref.finalize(one.untyped_storage(), self._freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
