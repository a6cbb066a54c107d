"""Directional derivatives of a network: along a velocity, in departure time, in arrival time.

Four modes with one contract: return the value with its graph and the derivative without one.
  dual        one dual forward (tangent/dual.py): the default; exact, activations as in an ordinary forward
  forward     torch.func.jvp under no_grad, then an ordinary graded forward; exact; the reference in tests
  joint       one graded torch.func.jvp for both; exact, about twice the activations; for comparison
  difference  a second forward at a point moved by a calibrated step; for compiled modules; error of order `step`
Times are in float32 or better, whatever the autocast dtype. Clock: 0 data, 1 noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowmap.base.precision import autocast_type
from flowmap.flow.tangent.dual import dual_forward
from flowmap.flow.tangent.torch_functions import random_state, replayed
from flowmap.flow.types import Cond, FlowMap, broadcast_time

DERIVATIVES = ("dual", "forward", "difference")
OLD_NAMES = {"ride": "dual"}  # of version 0.1

STEPS = {torch.float64: 1e-7, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The step of mode "difference" by the network's dtype, chosen so that truncation and rounding error are equal.

On a small attention network the relative error was 4e-8, 4e-4, - and 5e-2; with three times the slope it was 50 times
as large. Prefer mode "dual" if the network supports it.
"""


def derivative_named(name: str) -> str:
    """The canonical name of a derivative; "ride" was the name of "dual" in version 0.1. ValueError for other names."""
    found = OLD_NAMES.get(name, name)
    if found not in DERIVATIVES:
        raise ValueError(f"derivative: {name!r} is not one of {', '.join(DERIVATIVES)}")
    return found


def value_and_rate(
    function: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    *,
    mode: str = "dual",
    step: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(function(*primals) with its graph, its directional derivative along the tangents without one).

    The function takes tensors and returns one. A tangent of None is zero and costs nothing. `step` is for mode
    "difference": a number, or (B,) with a sign per sample; by default it is calibrated to the dtype. Mode "dual"
    accepts tangents with fewer rows than their primals. Raises a ValueError for an unknown mode, and a
    NotImplementedError with the operation's name if a tangent cannot follow.
    """
    mode = OLD_NAMES.get(mode, mode)
    if mode not in MODES:
        raise ValueError(f"derivative mode must be one of {', '.join(MODES)}, got {mode!r}")
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} primals need as many tangents, got {len(tangents)}")
    if step is not None and mode != "difference":
        raise ValueError(f"step belongs to mode 'difference', got {step!r} with mode {mode!r}")
    return MODES[mode](function, primals, tangents, step)


def eulerian_derivative(
    student: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    cond: Cond | None = None,
    *,
    mode: str = "dual",
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(F, dF/dt): the mean velocity with its graph, and its derivative along the velocity for fixed s, without one.

    x and velocity are (B, ...), t and s (B,). Mode "difference" steps to later times where t + step <= 1, otherwise to
    earlier ones. With `rows` only that many samples, the first, get a derivative; it is zero in the rest, which cost
    nothing in mode "dual".
    """
    t, s = at_least_float32(t), at_least_float32(s)
    step = inward_step(x, t, None) if mode == "difference" else None
    function = lambda x, t: student.mean_velocity(x, t, s, cond)
    return of_rows(function, (x, t), (velocity.to(x.dtype), torch.ones_like(t)), mode, step, rows)


def lagrangian_derivative(
    student: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond | None = None,
    *,
    mode: str = "dual",
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(F, dF/ds): the mean velocity with its graph, and its derivative in arrival time without one.

    Shapes and `rows` as in eulerian_derivative. Mode "difference" steps towards t where s + step <= t, otherwise away.
    """
    t, s = at_least_float32(t), at_least_float32(s)
    step = inward_step(x, s, t) if mode == "difference" else None
    return of_rows(lambda s: student.mean_velocity(x, t, s, cond), (s,), (torch.ones_like(s),), mode, step, rows)


def value_and_graded_rate(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """value_and_rate with a graph for both, by one torch.func.jvp: for objectives that also train through the rate."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with sdpa_kernel(SDPBackend.MATH), LayerNormByParts():
        return jvp_of(function, primals, tangents, moving)


class LayerNormByParts(TorchFunctionMode):
    """A mode in which layer_norm is computed from elementary operations.

    The forward derivative of torch's layer_norm (2.13) records mean and deviation as constants: the rate is right, but
    its gradient is wrong. (Those of group_norm and rms_norm are right.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = layer_norm_by_parts if func in (torch.nn.functional.layer_norm, torch.layer_norm) else func
        return func(*args, **(kwargs or {}))


def layer_norm_by_parts(x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, *unused) -> Tensor:
    """torch's layer_norm from elementary operations, in float32 or better; returns the dtype of x."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    unit = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = unit if weight is None else unit * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def without_graph(student: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
    """F(x, t, s) as a regression target, without graph.

    Autocast's weight cache is off: weights cast under no_grad would stay in it without a graph.
    """
    device = autocast_type(x.device)
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        return student.mean_velocity(x, at_least_float32(t), at_least_float32(s), cond)


def of_rows(function, primals, tangents, mode, step, rows: int | None) -> tuple[Tensor, Tensor]:
    """value_and_rate with the rate of the first `rows` samples, zero in the rest."""
    if rows is None or rows == len(primals[0]):
        return value_and_rate(function, primals, tangents, mode=mode, step=step)
    if rows == 0:
        value = function(*primals)
        return value, torch.zeros_like(value, requires_grad=False)
    if OLD_NAMES.get(mode, mode) == "dual":
        return value_and_rate(function, primals, tuple(tangent[:rows] for tangent in tangents))
    value, rate = value_and_rate(function, primals, tangents, mode=mode, step=step)
    return value, torch.cat([rate[:rows], torch.zeros_like(rate[rows:])])


def at_least_float32(t: Tensor) -> Tensor:
    """Times as float32, or float64 if they are already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def calibrated_step(x: Tensor) -> float:
    """The step for the dtype in which a network computes on x, under autocast or not."""
    device = autocast_type(x.device)
    return STEPS[torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype]


def inward_step(x: Tensor, time: Tensor, limit: Tensor | None) -> Tensor:
    """The calibrated step (B,): positive where time + step <= limit (None: 1), otherwise negative if time >= step."""
    step = torch.full_like(time, calibrated_step(x))
    fits = time + step <= (1 if limit is None else limit)
    return torch.where(fits | (time < step), step, -step)


def by_dual_forward(function, primals, tangents, step):
    return dual_forward(function, primals, tangents)


def by_forward_mode(function, primals, tangents, step):
    """The graded forward runs first: under autocast, weights cast under no_grad would stay cached without a graph."""
    value, derive = recorded(function, primals)
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with derive, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), without_fused_layers():
        rate = jvp_of(function, primals, tangents, moving)[1]
    return value, rate.detach()


@contextmanager
def without_fused_layers():
    """A context without the fused kernel of nn.TransformerEncoderLayer, which has no forward derivative.

    Torch takes that kernel in evaluation mode under no_grad.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def by_joint_forward_mode(function, primals, tangents, step):
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with sdpa_kernel(SDPBackend.MATH):
        value, rate = jvp_of(function, primals, tangents, moving)
    return value, rate.detach()


def by_difference(function, primals, tangents, step):
    """(F(p + h dp) - F(p)) / h, with one h or one per sample."""
    floats = [p for p, t in zip(primals, tangents, strict=True) if t is not None]
    step = calibrated_step(floats[0]) if step is None else step
    value, again = recorded(function, primals)
    with again, torch.no_grad():
        moved = [
            p if t is None else p + (broadcast_time(step, p) * t).to(p.dtype)
            for p, t in zip(primals, tangents, strict=True)
        ]
        rate = (function(*moved) - value) / broadcast_time(step, value)
    return value, rate.to(value.dtype).detach()


def recorded(function, primals):
    """The function's value, and a context in which the random numbers of that call are repeated."""
    device = primals[0].device
    before = random_state(device)
    return function(*primals), replayed(before, device)


def jvp_of(function, primals, tangents, moving):
    """torch.func.jvp of the function in the arguments `moving` only."""

    def of_moving(*values):
        given = dict(zip(moving, values, strict=True))
        return function(*(given.get(i, p) for i, p in enumerate(primals)))

    return torch.func.jvp(of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))


MODES = {
    "dual": by_dual_forward,
    "forward": by_forward_mode,
    "joint": by_joint_forward_mode,
    "difference": by_difference,
}
