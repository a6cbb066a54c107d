"""The torch.func transforms that are active: a tangent cannot follow an operation inside one."""

from __future__ import annotations

import sys
from types import FrameType

import torch

transform = torch._C._functorch.peek_interpreter_stack


def depth_of_transforms() -> int:
    """The number of active torch.func transforms."""
    return 0 if transform() is None else transform().level()


def transform_name() -> str:
    """The name of the innermost torch.func transform."""
    return f"torch.func.{str(transform().key()).rpartition('.')[-1].lower()}"


def under_torch_func() -> bool:
    """Whether a torch.func transform is on the Python call stack; torch has popped its own stack when a kernel runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch._functorch"):
        frame = frame.f_back
    return frame is not None
