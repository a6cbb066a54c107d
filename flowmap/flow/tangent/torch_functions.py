"""Torch's forward derivative of one operation, for operations without a rule, with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent.refused import name_of
from flowmap.flow.tangent.rows import mapped

KEEPERS = {torch.nn.functional.batch_norm, torch.batch_norm, torch.nn.functional.instance_norm, torch.instance_norm}
"""Functions that update running statistics in an argument: once per call, not again for the derivative."""


class Scalar(Tensor):
    """A 0-dim value that raises if torch reads a number from it, since that would silently drop its tangent."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        if function is torch.ops.aten._local_scalar_dense.default:
            raise NotImplementedError("torch reads a number from a tensor with a tangent, and the number has none")
        given, named = (mapped(x, lambda x: x.value if type(x) is Scalar else x) for x in (args, kwargs or {}))
        out = function(*given, **named)
        return scalar(out) if isinstance(out, Tensor) and out.ndim == 0 and has_derivative(out) else out


def scalar(value: Tensor) -> Scalar:
    """The 0-dim value as a Scalar."""
    x = value.as_subclass(Scalar)
    x.value = value
    return x


def forward_derivative(function: Callable, args: tuple, kwargs: dict, tangents: dict[int, Tensor]):
    """The tangent of one operation by torch's forward mode, with attention as elementary operations.

    `tangents` are keyed by the id of the value. Raises NotImplementedError with the operation's name if torch has no
    forward derivative of it.
    """

    def dual(x: Tensor) -> Tensor:
        tangent = tangents.get(id(x))
        if tangent is None:
            return x.clone() if function in KEEPERS else x
        return forward_ad.make_dual(x, tangent)

    def guarded(x: Tensor) -> Tensor:
        return scalar(x.detach()) if id(x) in tangents and x.ndim == 0 else x

    try:
        if any(t.ndim == 0 for t in tangents.values()):
            device = next(iter(tangents.values())).device
            with torch.no_grad(), replayed(random_state(device), device):
                function(*mapped(args, guarded), **mapped(kwargs, guarded))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            out = function(*mapped(args, dual), **mapped(kwargs, dual))
            leaves, structure = tree_flatten(list(out) if isinstance(out, Iterator) else out)
            found = [forward_ad.unpack_dual(v).tangent if has_derivative(v) else None for v in leaves]
    except Exception as error:  # torch raises various types for operations without a derivative
        raise NotImplementedError(
            f"no tangent rule for {name_of(function)}, and torch has no forward derivative of it: {error}"
        ) from error
    if any(t is None and has_derivative(v) for t, v in zip(found, leaves, strict=True)):
        raise NotImplementedError(f"no tangent rule for {name_of(function)}, and torch has no forward derivative of it")
    return tree_unflatten(found, structure)


def has_derivative(out) -> bool:
    """Whether an output contains floating-point or complex tensors, which can have a tangent."""
    if isinstance(out, Tensor):
        return out.is_floating_point() or out.is_complex()
    return isinstance(out, (tuple, list)) and any(has_derivative(v) for v in out) or isinstance(out, Iterator)


def draws(x, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether F.dropout draws random numbers with these arguments."""
    return training and p > 0


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the generators that an operation on this device may draw from."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Restore the state of the generators."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextmanager
def replayed(before: tuple[Tensor, Tensor | None], device: torch.device):
    """A context in which the generators repeat their numbers since `before`; afterwards they continue unaffected."""
    after = random_state(device)
    set_random_state(before, device)
    try:
        yield
    finally:
        set_random_state(after, device)
