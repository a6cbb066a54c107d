"""Weights are finite: a NaN or an infinite value is refused where they are written and where they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """ValueError that names `where` and the first of the tensors that holds a NaN or an infinite value. Costs one pass over them."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            seen = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite of 8-bit numbers
            if not bool(torch.isfinite(seen).all()):
                raise ValueError(
                    f"{where}: {name}: holds values that are not finite (NaN or infinite), so these weights are of no use"
                )
