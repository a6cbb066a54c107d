"""Operations that the dual forward refuses: in-place writes, and reading numbers from tensors without their tangent."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType

from torch import Tensor

IN_PLACE = (
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __imatmul__ __ifloordiv__ __imod__".split()
)
ESCAPES = (
    "item tolist numpy data_ptr untyped_storage storage storage_type _typed_storage __array__ __float__ __int__ "
    "__index__ __complex__ __dlpack__ __deepcopy__ __reduce_ex__ share_memory_ backward grad"
).split()
DETACHED = "takes numbers out of the dual forward without their tangent: call .detach() first if a constant is meant"


def short_name(function: Callable) -> str:
    """The function's unqualified name; torch's operator and scripted functions call it `name`."""
    return getattr(function, "__name__", "") or getattr(function, "name", type(function).__name__)


def name_of(function: Callable) -> str:
    """The user-visible name of the function: ".data" for an attribute, torch's name for an operation."""
    owner = getattr(function, "__self__", None)
    if short_name(function) in ("__get__", "__set__") and owner is not None:
        return f".{owner.__name__}"
    if "torch._ops" in type(function).__module__:
        return str(function)
    name = getattr(function, "__qualname__", short_name(function))
    return name.replace("TensorBase.", "Tensor.").replace("_VariableFunctionsClass.", "torch.")


@functools.lru_cache(maxsize=1024)
def in_place_position(function: FunctionType) -> int | None:
    """The position of the function's `inplace` argument; None if it has none."""
    names = list(inspect.signature(function, follow_wrapped=False).parameters)
    return names.index("inplace") if "inplace" in names else None


def in_place_flag(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether the call passes inplace=True."""
    position = in_place_position(function) if type(function) is FunctionType else None  # built-ins have none
    return bool(position is not None and kwargs.get("inplace", args[position] if len(args) > position else False))


def writes_in_place(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether the call overwrites an argument, by torch's naming, the inplace flag, out= or the operator's schema."""
    short, schema = short_name(function), getattr(getattr(function, "default", function), "_schema", None)
    trailing = short in IN_PLACE or short == "__set__" or (short.endswith("_") and not short.endswith("__"))
    return (
        trailing
        or (schema is not None and schema.is_mutable)
        or kwargs.get("out") is not None
        or in_place_flag(function, args, kwargs)
    )


def refuse_by_name(function: Callable, args: tuple, kwargs: dict) -> None:
    """Raise NotImplementedError for in-place writes and for reading numbers out of tensors."""
    name, short = name_of(function), short_name(function)
    if short in ESCAPES or short == "__get__":
        raise NotImplementedError(f"{name} {DETACHED}")
    if writes_in_place(function, args, kwargs):
        raise NotImplementedError(
            f"{name} writes in place or into out=, which no tangent can follow: use the form that returns a new tensor"
        )
    if short == "triangular_solve":
        raise NotImplementedError(
            f"{name}: torch's forward derivative is wrong in the matrix: use torch.linalg.solve_triangular"
        )
    if short == "normal":
        raise NotImplementedError(
            f"{name}: torch's derivative in mean and deviation is zero: write mean + std * torch.randn_like(...)"
        )
    if short == "logcumsumexp" and any(isinstance(x, Tensor) and x.is_complex() for x in (*args, *kwargs.values())):
        raise NotImplementedError(f"{name} of complex numbers: torch's forward derivative is NaN")
