"""Functions of torch that are made of others: the dual forward follows their Python body, operation by operation.

torch.nn.MultiheadAttention, and with it nn.TransformerEncoderLayer, calls one such function. As one operation it would
be left to torch's forward derivative, which computes it a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F


def opened(function: Any) -> FunctionType:
    """The function without its test for tensors that override it, with which its body is run on any tensor."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    inside = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside


OPENED: dict[Callable, FunctionType] = {
    F.multi_head_attention_forward: opened(F.multi_head_attention_forward),
}
