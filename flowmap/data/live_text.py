"""Text embeddings that are computed when a batch is used, by a frozen encoder that stays on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

GROUP = 4  # captions that are encoded together
CACHE_BYTES = 256 * 2**20  # of the embeddings that are kept, on the encoder's device
Row = dict[str, Tensor]


@runtime_checkable
class Movable(Protocol):
    """A network that can be moved to a device, and converted to a precision."""

    def to(self, device: torch.device | str | torch.dtype) -> Any: ...


class LoadsText(Protocol):
    """The settings of a text encoder, as in data/encoded.py."""

    def load(self) -> Any: ...


class LiveText:
    """live(captions) -> the conditions of a batch, a row for each caption, rounded to half precision as stored ones
    are.

    A row depends on its caption alone, not on the others of the batch or on what was encoded before: captions are
    encoded in groups of one size, filled up with "". Hence a resumed run has the same rows. The network is loaded when
    it is first needed; a copy in another process is without it.
    """

    def __init__(self, spec: LoadsText):
        self.spec, self.device = spec, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype: torch.dtype | None = None  # of the network's weights; None: that of its files
        self._network: Any = None
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None, "_rows": OrderedDict(), "_bytes": 0}

    def to(self, device: torch.device | str) -> None:
        """Encode on that device from now on."""
        if torch.device(device) != self.device:
            self.device, self._rows, self._bytes = torch.device(device), OrderedDict(), 0
            self._network = on_device(self._network, device)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Encode with weights of that dtype from now on."""
        if dtype != self.dtype:
            self.dtype, self._network, self._rows, self._bytes = dtype, None, OrderedDict(), 0

    def __call__(self, captions: Sequence[str]) -> Row:
        wanted = list(dict.fromkeys(captions))
        found = {caption: self._rows[caption] for caption in wanted if caption in self._rows}
        missing = [caption for caption in wanted if caption not in found]
        for at in range(0, len(missing), GROUP):
            found |= self._encoded(missing[at : at + GROUP])
        for caption in wanted:
            self._keep(caption, found[caption])
        names = found[wanted[0]]
        return {name: _together([found[caption][name] for caption in captions], name) for name in names}

    @torch.no_grad()
    def _encoded(self, captions: list[str]) -> dict[str, Row]:
        if self._network is None:
            network = self.spec.load()
            converted = network if self.dtype is None else on_device(network, self.dtype)
            self._network = on_device(converted, self.device)
        rows = self._network(captions + [""] * (GROUP - len(captions)))
        compact = {name: value.half() if value.is_floating_point() else value.bool() for name, value in rows.items()}
        return {
            caption: {name: value[i].clone() for name, value in compact.items()} for i, caption in enumerate(captions)
        }

    def _keep(self, caption: str, row: Row) -> None:
        """Keep the row, and drop those that were not used for longest."""
        if caption not in self._rows:
            self._bytes += _size(row)
        self._rows[caption] = row
        self._rows.move_to_end(caption)
        while self._bytes > CACHE_BYTES:
            self._bytes -= _size(self._rows.popitem(last=False)[1])


def _together(rows: list[Tensor], name: str) -> Tensor:
    """The rows (B, ...) in full precision."""
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"{name}: is of the shapes {sorted(shapes)}; texts must be padded to one length")
    together = torch.stack(rows)
    return together if together.dtype == torch.bool else together.float()


def _size(row: Row) -> int:
    return sum(value.nbytes for value in row.values())


def on_device(network: Any, device: torch.device | str | torch.dtype) -> Any:
    """The network on the device, or in the dtype; unchanged if it cannot be moved."""
    return network.to(device) if isinstance(network, Movable) else network
