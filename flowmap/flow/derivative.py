"""Directional derivatives of a network: along a velocity, in departure time, in arrival time. The one place that knows how they are taken.

Four ways to one contract, value with graph and rate without:
  ride        one graded forward beside which the tangent rides (riding.py): the default; exact, activations as in an ordinary forward
  forward     torch.func.jvp under no_grad, then an ordinary graded forward; exact; the reference in tests
  joint       one graded torch.func.jvp for both; exact, about twice the activations; for comparison
  difference  one more forward at a point moved by a calibrated step; for compiled or foreign modules; error of order `step`
Times are taken in float32 or better whatever autocast says. Clock: 0 data, 1 noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowmap.flow.tangent.dual import dual_forward
from flowmap.flow.tangent.torch_functions import random_state, replayed
from flowmap.flow.types import Cond, FlowMap, broadcast_time

DERIVATIVES = ("dual", "forward", "difference")
OLD_NAMES = {"ride": "dual"}  # of version 0.1

STEPS = {torch.float64: 1e-7, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The step of a difference by the dtype in which the network computes: where truncation and rounding error meet. On a small attention network
the relative error was 4e-8, 4e-4, - and 5e-2; a network three times as steep erred 50 times as much. Ride where a network can be ridden.
"""


def derivative_named(name: str) -> str:
    """The canonical name of a derivative; "ride" is the name that version 0.1 gave to "dual". ValueError for an unknown name."""
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
    """(function(*primals) with its graph, its directional derivative along the tangents without graph).

    The function takes tensors and gives one; a tangent of None is zero and costs nothing. step is that of mode "difference": a number, or (B,)
    with a sign a sample; None is calibrated to the dtype. Mode "dual" takes tangents of fewer rows than their primals. Raises ValueError
    for an unknown mode, NotImplementedError naming an operation through which a tangent cannot follow.
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
    """(F, dF/dt): the mean velocity with its graph, and its rate without, as (x, t) moves along the velocity while s rests.

    x and velocity are (B, ...), t and s (B,). A difference steps to later times where t + step <= 1, to earlier ones elsewhere.
    With `rows` only the first so many samples are derived, and the rate is zero in the rest: those cost nothing in mode "dual".
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
    """(F, dF/ds): the mean velocity with its graph, and its rate in arrival time without. Shapes and rows as in eulerian_derivative.

    A difference steps towards t where s + step <= t, away from it elsewhere.
    """
    t, s = at_least_float32(t), at_least_float32(s)
    step = inward_step(x, s, t) if mode == "difference" else None
    return of_rows(lambda s: student.mean_velocity(x, t, s, cond), (s,), (torch.ones_like(s),), mode, step, rows)


def value_and_graded_rate(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """value_and_rate with a graph for both, by one torch.func.jvp: for objectives whose gradient runs through the rate as well."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with sdpa_kernel(SDPBackend.MATH), LayerNormByParts():
        return jvp_of(function, primals, tangents, moving)


class LayerNormByParts(TorchFunctionMode):
    """Inside, layer_norm is made of mean and square.

    The forward derivative of torch's own (2.13) takes mean and deviation for constants in what it records: the rate is right, its gradient
    is not. (That of group_norm and rms_norm is right.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = layer_norm_by_parts if func in (torch.nn.functional.layer_norm, torch.layer_norm) else func
        return func(*args, **(kwargs or {}))


def layer_norm_by_parts(x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, *unused) -> Tensor:
    """torch's layer_norm, in float32 or better, typed like x."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    unit = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = unit if weight is None else unit * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def without_graph(student: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
    """F(x, t, s) as a number to aim at: no graph, and none of the casts that autocast would keep, which would have none either."""
    device = x.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        return student.mean_velocity(x, at_least_float32(t), at_least_float32(s), cond)


def of_rows(function, primals, tangents, mode, step, rows: int | None) -> tuple[Tensor, Tensor]:
    """value_and_rate with the rate of the first `rows` samples alone, zero in the rest; of none where rows is 0."""
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
    """Times as float32, or float64 if they are."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def calibrated_step(x: Tensor) -> float:
    """The step for the dtype in which a network computes on x."""
    device = x.device.type
    return STEPS[torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype]


def inward_step(x: Tensor, time: Tensor, limit: Tensor | None) -> Tensor:
    """The calibrated step, (B,): positive where time + step stays within the limit (None: 1), else negative, if that stays within 0."""
    step = torch.full_like(time, calibrated_step(x))
    fits = time + step <= (1 if limit is None else limit)
    return torch.where(fits | (time < step), step, -step)


def by_dual_forward(function, primals, tangents, step):
    return dual_forward(function, primals, tangents)


def by_forward_mode(function, primals, tangents, step):
    """Ordinary forward first: under autocast, weights cast under no_grad would stay in the cache without a graph."""
    value, derive = recorded(function, primals)
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with derive, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rate = jvp_of(function, primals, tangents, moving)[1]
    return value, rate.detach()


def by_joint_forward_mode(function, primals, tangents, step):
    moving = [i for i, t in enumerate(tangents) if t is not None]
    with sdpa_kernel(SDPBackend.MATH):
        value, rate = jvp_of(function, primals, tangents, moving)
    return value, rate.detach()


def by_difference(function, primals, tangents, step):
    """(F(p + h dp) - F(p)) / h, h of one sign or of a sign a sample."""
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
    """The function's value, and a context in which the random draws of that call are drawn again."""
    device = primals[0].device
    before = random_state(device)
    return function(*primals), replayed(before, device)


def jvp_of(function, primals, tangents, moving):
    """torch.func.jvp of the function in those arguments alone that move."""

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
