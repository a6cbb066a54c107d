"""One shard of an encoding while it is made: its rows as Arrow batches, and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.images import from_bytes
from flowmap.data.encoded import MASK, TEXT
from flowmap.data.shards import to_column, to_trimmed_column, write_stream
from flowmap.data.sources import Item


class Shard:
    """Take items batch by batch, from position `start` on; unusable ones are skipped by name and keep their position.

    encoder: (uint8 images (B, C, H, W), captions) -> columns (B, ...), "x0" among them. trimmed: store the text
    embeddings without padding.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor, list[str]], dict[str, Tensor]],
        start: int,
        num_classes: int | None,
        *,
        wants_text: bool,
        trimmed: bool = False,
    ):
        self.encoder, self.start, self.num_classes, self.wants_text = encoder, start, num_classes, wants_text
        self.trimmed = trimmed
        self.positions = self.rows = self.grey = self.missing_captions = self.unlabelled = self.values = 0
        self.max_label: int | None = None
        self.labels: Counter[int] = Counter()
        self.left_out: list[tuple[str, str]] = []
        self.columns: dict[str, Any] = {}
        self.batches: list[Any] = []
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, items: list[Item]) -> None:
        usable = []
        for position, item in enumerate(items, self.start + self.positions):
            problem = self._problem(item)
            if problem is None:
                usable.append((position, item))
            else:
                self.left_out.append((item.key, problem))
        self.positions += len(items)
        if not usable:
            return
        images = [item.image for _, item in usable if item.image is not None]  # all of them
        columns = self.encoder(torch.stack(images), [item.caption or "" for _, item in usable])
        finite = torch.stack([value.flatten(1).isfinite().all(1) for value in columns.values()]).all(0)
        self.left_out += [
            (item.key, "is not finite in half precision when encoded")
            for (_, item), ok in zip(usable, finite, strict=True)
            if not ok
        ]
        if finite.any():
            kept = [one for one, ok in zip(usable, finite, strict=True) if ok]
            self._keep(kept, {name: value[finite] for name, value in columns.items()})

    def summary(self) -> dict[str, Any]:
        """Return the summary as plain values.

        sum and squares are over all pixels of each channel of x0, class_rows by label.
        """
        return {
            "positions": self.positions,
            "rows": self.rows,
            "grey": self.grey,
            "missing_captions": self.missing_captions,
            "unlabelled": self.unlabelled,
            "max_label": self.max_label,
            "left_out": self.left_out,
            "columns": self.columns,
            "values": self.values,
            "class_rows": {str(label): self.labels[label] for label in sorted(self.labels)},
            "sum": self.sum.tolist(),
            "squares": self.squares.tolist(),
        }

    def write(self, path: Path) -> None:
        """Write an Arrow stream file; without any row, one of the plain columns alone."""
        write_stream(path, self.batches or [_batch([], {}, trimmed=False)])

    def _problem(self, item: Item) -> str | None:
        if item.image is None:
            return item.problem or "cannot be used"
        if item.label is not None and self.num_classes is not None and not 0 <= item.label < self.num_classes:
            return f"its label is {item.label}, not one of 0..{self.num_classes - 1}"
        return None

    def _keep(self, kept: list[tuple[int, Item]], columns: dict[str, Tensor]) -> None:
        shapes = {
            name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in columns.items()
        }
        self.columns = self.columns or shapes
        if shapes != self.columns:
            name = next(name for name in shapes if shapes[name] != self.columns.get(name))
            raise ValueError(
                f"{name}: is {shapes[name]} for one batch and {self.columns.get(name)} for another; "
                "texts must be padded to one length"
            )
        self.rows += len(kept)
        self.grey += sum(item.grey for _, item in kept)
        self.missing_captions += self.wants_text * sum(not (item.caption or "").strip() for _, item in kept)
        labels = [item.label for _, item in kept if item.label is not None]
        self.labels.update(labels)
        self.unlabelled += len(kept) - len(labels)
        self.max_label = max([*labels, *([] if self.max_label is None else [self.max_label])], default=None)
        self._count(columns["x0"])
        self.batches.append(_batch(kept, columns, trimmed=self.trimmed))

    def _count(self, x0: Tensor) -> None:
        values = from_bytes(x0, torch.float64) if x0.dtype == torch.uint8 else x0.double()
        values = values.flatten(2).transpose(0, 1).flatten(1) if x0.ndim > 2 else values.T
        self.sum, self.squares, self.values = (
            self.sum + values.sum(1),
            self.squares + (values**2).sum(1),
            self.values + values.shape[1],
        )


def _batch(kept: list[tuple[int, Item]], columns: dict[str, Tensor], *, trimmed: bool) -> Any:
    import pyarrow

    arrays = {
        "position": pyarrow.array([position for position, _ in kept], pyarrow.int64()),
        "key": pyarrow.array([item.key for _, item in kept], pyarrow.string()),
        "label": pyarrow.array([-1 if item.label is None else item.label for _, item in kept], pyarrow.int64()),
        "caption": pyarrow.array([item.caption for _, item in kept], pyarrow.string()),
    }
    arrays |= {name: to_column(value) for name, value in columns.items() if not (trimmed and name == TEXT)}
    if trimmed:
        arrays[TEXT] = to_trimmed_column(columns[TEXT], columns[MASK])
    return pyarrow.record_batch(arrays)
