"""The dual forward: one graded forward pass that also computes a directional derivative, outside the graph.

A DualTensor is a value with its tangent. Torch passes every function called on one to `__torch_function__`, which
calls the function unchanged on the values (graph, fused kernels, autocast and random draws are those of an ordinary
forward) and a rule on the tangents under no_grad. A tangent is never dropped silently: an operation has a rule, or a
forward derivative in torch, or is known to be constant (rules_constant.py), or raises NotImplementedError with its
name. Kernels that are reached in any other way raise as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent.methods import give_methods
from flowmap.flow.tangent.opened import OPENED
from flowmap.flow.tangent.refused import DETACHED, in_place_flag, name_of, refuse_by_name, short_name
from flowmap.flow.tangent.rows import Rows, apart, filled, mapped, rows_of, size_of, whole
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import accepts, ask, constant, linear, shaped_like, torch_arguments
from flowmap.flow.tangent.rules_nn import dropout
from flowmap.flow.tangent.rules_shape import reshaped
from flowmap.flow.tangent.torch_functions import draws, forward_derivative, has_derivative, random_state, replayed
from flowmap.flow.tangent.transforms import depth_of_transforms, transform, transform_name, under_torch_func
from flowmap.flow.tangent.watch import watched

PLAIN_TYPES = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None), slice}
PLAIN_TYPES |= {torch.dtype, torch.device, torch.Size}
"""Types that cannot contain a dual tensor."""
is_graded, set_graded = torch.is_grad_enabled, torch._C._set_grad_enabled


class Context:
    """One dual forward. When it has ended, its dual tensors act as plain values: checkpointing recomputes on them."""

    def __init__(self):
        self.active = True
        self.depth = depth_of_transforms()


class DualTensor(Tensor):
    """A tensor with `value`, the ordinary tensor that operations see, and `tangent`, of its shape and dtype, no graph.

    If `rows` is not None, the tangent belongs to the value's first rows only (rows.py). `version` is the version
    counter of the value's memory when the tangent was computed: a different one later means that the value was
    overwritten. `joint` is the node of an autograd.Function that returned this tensor; it precedes the value's own
    node in the graph.
    """

    value: Tensor
    tangent: Tensor
    context: Context
    rows: Rows | None
    version: int | None
    joint: Node | None = None
    leaving = False

    @property
    def grad_fn(self):  # type: ignore[override]  # torch annotates its descriptor as an attribute
        return self.joint or self.value.grad_fn

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return carry(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        """A kernel that was reached without `__torch_function__`: raise during the dual forward."""
        duals: list[DualTensor] = []
        values, named = plain(args, duals), plain(kwargs or {}, duals)
        if function is torch.ops.aten.alias.default and duals[0].leaving:
            return function(*values)
        if any(x.context.active for x in duals):
            way = (
                "inside torch.func"
                if under_torch_func()
                else "as a number, as data of a new tensor, or by an internal function of torch"
            )
            raise NotImplementedError(
                f"{function} is called on a tensor with a tangent ({way}), which cannot follow: .detach() first"
            )
        return function(*values, **named)

    def as_subclass(self, cls):
        """Itself for Tensor; other subclasses have their own rules, which a tangent cannot follow."""
        if cls is Tensor or not self.context.active:
            return self if self.context.active else self.value.as_subclass(cls)
        raise NotImplementedError(f"Tensor.as_subclass({cls.__name__}) {DETACHED}")


def dual_forward(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The function's value with its graph, bit-equal to an ordinary call, and its directional derivative without one.

    A tangent of None is zero and costs nothing. A tangent with fewer rows (in dimension 0) than its primal is zero in
    the missing rows, which cost nothing either. Raises NotImplementedError with the operation's name if a tangent
    cannot follow it.
    """
    context = Context()
    args = [enter(p, t, context) for p, t in zip(distinct(primals), tangents, strict=True)]
    try:
        with watched(carry, through_autograd_function, through_hidden):
            out = function(*args)
    finally:
        context.active = False
    if not isinstance(out, Tensor):
        raise ValueError(f"the function must return one tensor, got {type(out).__name__}")
    return (out.value, filled(out)) if type(out) is DualTensor else (out, torch.zeros_like(out, requires_grad=False))


def distinct(primals: Sequence[Tensor]) -> list[Tensor]:
    """The primals as distinct objects, since tangents are looked up by the id of their primal."""
    return [p.view_as(p) if any(p is q for q in primals[:i]) else p for i, p in enumerate(primals)]


def enter(primal: Tensor, tangent: Tensor | None, context: Context) -> Tensor:
    """The primal as an argument of the dual forward: a dual tensor, or itself if it has no tangent."""
    if type(primal) is DualTensor:
        if primal.context.active:
            raise NotImplementedError(
                "a dual forward inside a dual forward: second derivatives are not supported; use mode='forward' inside"
            )
        primal = primal.value
    if tangent is None:
        return primal
    rows = None
    if tangent.shape != primal.shape:
        shorter = primal.ndim == tangent.ndim and 0 < len(tangent) < len(primal)
        if tangent.shape[1:] != primal.shape[1:] or not shorter:
            wanted = f"its primal's shape {tuple(primal.shape)}, or fewer rows"
            raise ValueError(f"a tangent must have {wanted}, got {tuple(tangent.shape)}")
        rows = Rows(-primal.ndim, len(tangent))
    return dual_tensor(primal, tangent.detach(), context, rows)


def dual_tensor(value: Tensor, tangent: Tensor, context: Context, rows: Rows | None = None) -> DualTensor:
    """A dual tensor. Operations see `value` itself, so their graph is the ordinary one and saves no tangent."""
    if tangent.dtype is not value.dtype:
        tangent = tangent.to(value.dtype)
    shape = size_of(value, rows)
    if tangent.shape != shape:
        tangent = tangent.expand(shape)
    x = value.as_subclass(DualTensor)
    x.value, x.tangent, x.context, x.rows = value, tangent, context, rows
    try:
        x.version = value._version
    except RuntimeError:  # an inference tensor has none
        x.version = None
    return x


def carry(function: Callable, args: tuple, kwargs: dict):
    """The function's output on the values, with the tangent that the function's rule returns.

    It runs once per operation, in a few microseconds of the host: common cases come first.
    """
    duals: list[DualTensor] = []
    values = tuple([x if type(x) in PLAIN_TYPES else plain(x, duals) for x in args])
    named = plain(kwargs, duals) if kwargs else kwargs
    for x in duals:
        if not x.context.active:
            duals = [x for x in duals if x.context.active]
            break
    if not duals:
        return function(*values, **named)
    check_consistent(duals, function)
    rule = RULES.get(function)
    if (rule is linear or rule is reshaped) and duals[0] is args[0] and len(duals) == 1 and not named:
        return moved(rule, function, duals[0], values)
    if rule is None:
        if (inside := OPENED.get(function)) is None:
            return without_rule(function, args, values, named, duals)
        with torch._C._EnableTorchFunction():
            return inside(*args, **kwargs)
    if named:
        values, named = torch_arguments(rule, values, named)
        if named.get("out") is not None:
            return without_rule(function, args, values, named, duals)
    if type(function) is FunctionType:
        if in_place_flag(function, values, named):
            return without_rule(function, args, values, named, duals)
        if rule is dropout and draws(*values, **named):
            return by_torch(function, values, named, duals)
    out = function(*values, **named)
    # the rule of Tensor.view refuses to reinterpret bits as integers
    if rule is constant or not has_derivative(out) and function is not Tensor.view:
        return out
    if out is duals[0].value and (rule is shaped_like or rule is dropout) and len(duals) == 1 and not out.is_complex():
        return duals[0]  # such as .to(dtype) of a tensor of that dtype
    graded = is_graded()  # torch.no_grad, inlined
    set_graded(False)
    try:
        tangent, rows = by_rule(rule, function, out, values, named, duals)
    finally:
        set_graded(graded)
    return with_tangent(out, tangent, duals[0].context, rows)


give_methods(DualTensor, carry)


def moved(rule: Callable, function: Callable, x: DualTensor, values: tuple):
    """A function that moves or sums the numbers of x, its only dual argument: the same function moves the tangent.

    That needs no no_grad: the tangent has no graph.
    """
    out = function(*values)
    if out is x.value and not out.is_complex():  # such as .contiguous(); not .resolve_conj(), which a tangent may need
        return x
    if rule is reshaped and out.dtype is not x.value.dtype:
        raise NotImplementedError(f"Tensor.view as {out.dtype}: the bits of {x.value.dtype} have no derivative")
    tangent, rows = x.tangent, x.rows
    if rows is not None and (rows := rows_of(function, out, x, values)) is None:
        tangent = whole(x)
    tangent = tangent.reshape(size_of(out, rows)) if rule is reshaped else function(tangent, *values[1:])
    return with_tangent(out, tangent, x.context, rows)


def by_rule(rule: Callable, function: Callable, out, args: tuple, kwargs: dict, live: list[DualTensor]):
    """(tangent of out, its rows): of the dual rows only if the operation treats rows independently, else of all rows.

    Torch's forward derivative replaces a rule that returns NotImplemented.
    """
    if not accepts(rule, len(args), tuple(kwargs)):
        return forward_derivative(function, args, kwargs, {id(x.value): filled(x) for x in live}), None
    if len(live) > 1 and live[0].value is live[1].value or len(live) > 2:
        args, kwargs, live = with_distinct_arguments(args, kwargs, live)
    if live[0].rows is not None and (part := apart(function, out, args, kwargs, live)) is not None:
        tangent = ask(rule, function, *part[:-1])
        if tangent is not NotImplemented:
            return tangent, part[-1]
    tangents = {}
    for x in live:
        tangents[id(x.value)] = x.tangent if x.rows is None else whole(x)
    tangent = ask(rule, function, out, args, kwargs, tangents)
    if tangent is NotImplemented:
        tangent = forward_derivative(function, args, kwargs, tangents)
    return tangent, None


def with_distinct_arguments(args: tuple, kwargs: dict, live: list[DualTensor]):
    """The call with a distinct object for every occurrence of a dual tensor.

    `ask` records by object which tangents a rule has read: reading one occurrence must not count as reading the others.
    """
    duals, copies = {id(x.value): x for x in live}, []
    if len(duals) == len(live):
        return args, kwargs, live

    def copy_of(value: Tensor) -> Tensor:
        x = duals.get(id(value))
        if x is None:
            return value
        copies.append(dual_tensor(value.detach(), x.tangent, x.context, x.rows))
        return copies[-1].value

    return mapped(args, copy_of), mapped(kwargs, copy_of), copies


def plain(x, duals: list):
    """x with dual tensors replaced by their values, also inside lists, tuples and dicts; `duals` collects them."""
    kind = type(x)
    if kind is DualTensor:
        duals.append(x)
        return x.value
    if kind in PLAIN_TYPES:
        return x
    if kind is tuple or kind is list:
        return kind([plain(v, duals) for v in x])
    if isinstance(x, (tuple, list)) and kind is not torch.Size:  # a named tuple
        return tuple(plain(v, duals) for v in x)
    return {key: plain(v, duals) for key, v in x.items()} if isinstance(x, dict) else x


def check_consistent(live: list[DualTensor], function: Callable) -> None:
    """Raise if a value was overwritten through a view or .detach(), or is used inside torch.func."""
    for x in live:
        if x.version is not None and x.value._version != x.version:
            raise NotImplementedError(
                f"{name_of(function)} gets a tensor that was written in place through another one: its tangent is stale"
            )
    if transform() is not None and depth_of_transforms() > live[0].context.depth:
        raise NotImplementedError(
            f"{name_of(function)} inside {transform_name()} cannot be followed by a tangent: use mode='forward'"
        )


def with_tangent(out, tangent, context: Context, rows: Rows | None = None):
    """The output as a dual tensor; a tuple's entries get a tangent each."""
    if tangent is None:
        return out
    if isinstance(out, Tensor):
        return dual_tensor(out, tangent, context, rows)
    if type(out) is tuple or type(out) is list:
        pairs = zip(out, tangent, strict=True)
        return type(out)([v if t is None else dual_tensor(v, t, context, rows) for v, t in pairs])
    if isinstance(out, Iterator):
        return iter([dual_tensor(v, t, context, rows) for v, t in zip(out, tangent, strict=True)])
    leaves, structure = tree_flatten(out)
    pairs = zip(leaves, tree_flatten(tangent)[0], strict=True)
    return tree_unflatten([v if t is None else dual_tensor(v, t, context, rows) for v, t in pairs], structure)


def without_rule(function: Callable, args: tuple, values: tuple, named: dict, live: list[DualTensor]):
    """One operation by torch's forward derivative. Raises for in-place writes and for reading numbers from tensors."""
    if (
        short_name(function) == "__set__"
        and name_of(function) in (".requires_grad", ".grad")
        and type(args[1]) is not DualTensor
    ):
        return function(*values, **named)
    refuse_by_name(function, values, named)
    return by_torch(function, values, named, live)


def by_torch(function: Callable, args: tuple, kwargs: dict, live: list[DualTensor]):
    """The function on the values, then torch's forward derivative of it with the same random numbers."""
    device = live[0].value.device
    before = random_state(device)
    out = function(*args, **kwargs)
    if out is None:
        return out
    if not has_derivative(out):
        what = f"gives {type(out).__name__} without a derivative, not known to be constant"
        raise NotImplementedError(f"{name_of(function)} {what}: .detach() first")
    with replayed(before, device):
        tangent = forward_derivative(function, args, kwargs, {id(x.value): filled(x) for x in live})
        return with_tangent(out, tangent, live[0].context)


def through_hidden(name: str, function: Callable, args: tuple, kwargs: dict):
    """Raise for a function that torch does not pass to `__torch_function__` and that no tangent can follow."""
    duals: list[DualTensor] = []
    values, named = plain(args, duals), plain(kwargs, duals)
    if any(x.context.active for x in duals):
        raise NotImplementedError(f"{name} {DETACHED}")
    return function(*values, **named)


def through_autograd_function(cls: type[torch.autograd.Function], apply: Callable, args: tuple):
    """Call an autograd.Function with a jvp, or of torch itself (checkpointing, FSDP, DDP); raise for any other."""
    duals: list[DualTensor] = []
    values = plain(args, duals)
    duals = [x for x in duals if x.context.active]
    name = f"{cls.__module__}.{cls.__qualname__}"
    refusal = NotImplementedError(
        f"no tangent rule for the autograd.Function {name}: give it a jvp, or use mode='difference'"
    )
    if not duals:
        out = apply(*args)
        if any(type(x) is DualTensor and x.context.active for x in tree_flatten(out)[0]):
            raise refusal
        return out
    if cls.jvp is not torch.autograd.Function.jvp:
        with torch._C.DisableTorchFunctionSubclass():
            return by_torch(apply, values, {}, duals)
    if not cls.__module__.startswith("torch."):
        raise refusal
    leaves, structure = tree_flatten(apply(*args))
    if any(has_derivative(x) and type(x) is not DualTensor for x in leaves):
        raise refusal
    return tree_unflatten([reenter(x) if type(x) is DualTensor else x for x in leaves], structure)


def reenter(x: DualTensor) -> DualTensor:
    """The output x of an autograd.Function as a dual tensor with a value in the graph that torch has attached x to."""
    x.leaving = True
    with torch._C.DisableTorchFunctionSubclass():
        y = dual_tensor(Tensor.as_subclass(x, Tensor), x.tangent, x.context, x.rows)
        y.joint = Tensor.grad_fn.__get__(x)  # type: ignore[union-attr]  # torch annotates a descriptor as an attribute
    return y
