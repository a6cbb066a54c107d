"""Refuses weights with NaN or infinite values when they are written and when they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise a ValueError that names `where` and the first tensor with a NaN or an infinite value, if there is one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            values = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite for 8-bit floats
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{where}: {name}: has values that are not finite (NaN or infinite)")
