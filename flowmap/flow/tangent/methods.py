"""Methods of dual tensors that reach their rule directly: half a microsecond where torch takes two."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import Tensor

from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import constant

ATTRIBUTES = "shape dtype device ndim".split()
OPERATORS = "__add__ __sub__ __mul__ __truediv__ __matmul__ __pow__ __neg__".split()
"""Not the reflected ones: Python would compute a / b as b.__rtruediv__(a), which rounds differently. Nor __getitem__:
torch takes a class that defines it for a sequence."""


def give_methods(cls: type[Tensor], carry: Callable) -> None:
    """Give a class of dual tensors methods for the operations with a rule, and the attributes of their values.

    carry(function, args, kwargs) is what torch would call by `__torch_function__`.
    """
    for name in ATTRIBUTES:
        setattr(cls, name, property(attrgetter(f"value.{name}")))
    for name in dir(Tensor):
        if name in OPERATORS or not name.startswith("_"):
            function = getattr(Tensor, name)
            if RULES.get(function, constant) is not constant:
                setattr(cls, name, direct(name, function, carry))


def direct(name: str, function: Callable, carry: Callable) -> Callable:
    """The method of that name: `carry` with torch's function, or the function that a user has put in its place."""

    def method(*args, **kwargs):
        now = getattr(Tensor, name)
        return carry(function, args, kwargs) if now is function else now(*args, **kwargs)

    return method
