"""The bytes of tensors that are alive at once while a function runs, also on the meta device."""

from __future__ import annotations

import weakref

from flowmap.estimate.remembered import Mode, remembered, tensors_in


class LiveBytes(Mode):
    """Within it, `peak` is the largest sum of the bytes of tensors that were made there and are alive."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # a view is of a storage that it was given: counted already, or made before
        given = {one.untyped_storage()._cdata for one in tensors_in(args, kwargs)}
        out = remembered(function, args, kwargs or {})
        for one in tensors_in(out):
            storage = one.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
