"""A tangent that rides: one graded forward, beside which a directional derivative is carried outside the graph.

A `Riding` tensor is a value with its tangent. Torch hands every function called on one to `__torch_function__`, which calls the function
as it is on the values (so graph, fused kernels, autocast and random draws are those of an ordinary forward) and a rule on the tangents under
no_grad. A tangent is never dropped in silence: an operation has a rule, or a forward derivative of torch's own, or is proved constant
(rules_constant.py), or is refused by name. What reaches a kernel of torch without having come this way is refused as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, FunctionType

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent.refused import DETACHED, in_place_flag, name_of, refuse_by_name, short_name
from flowmap.flow.tangent.rows import Rows, apart, filled, mapped
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import accepts, ask, constant
from flowmap.flow.tangent.rules_nn import dropout
from flowmap.flow.tangent.torch_functions import forward_derivative, has_derivative, random_state, replayed
from flowmap.flow.tangent.watch import watched

LEAVES = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device, slice, torch.Size}
"""Types in which nothing that rides can hide."""
ALIASES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}
"""Names of numpy's that torch takes for its own."""
transform = torch._C._functorch.peek_interpreter_stack
is_graded, set_graded = torch.is_grad_enabled, torch._C._set_grad_enabled


class Context:
    """One forward pass. Once it is over, what rode in it is a constant: activation checkpointing recomputes on such tensors, plainly."""

    def __init__(self):
        self.active = True
        self.depth = depth_of_transforms()


class DualTensor(Tensor):
    """A tensor with `value`, the ordinary tensor that operations see, and `tangent`, of its shape and dtype, without graph.

    Where `rows` is not None the tangent is that of the value's first rows alone (riding_rows.py). `version` is that of the value's memory
    when the tangent was taken. Joined to the graph by an autograd.Function it has that function's node, `joint`, behind its value's.
    """

    value: Tensor
    tangent: Tensor
    dual_forward: Context
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
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]  # torch types its default, no classmethod
        """A kernel that was reached past `__torch_function__`: refused while the ride is under way."""
        duals: list[DualTensor] = []
        values, named = plain(args, duals), plain(kwargs or {}, duals)
        if function is torch.ops.aten.alias.default and duals[0].leaving:
            return function(*values)
        if any(x.dual_forward.active for x in duals):
            way = (
                "inside torch.func"
                if under_torch_func()
                else "as a number, as data of a new tensor, or by a function that torch keeps to itself"
            )
            raise NotImplementedError(
                f"{function} is called on what carries a tangent ({way}), and the tangent cannot follow: .detach() first"
            )
        return function(*values, **named)

    def as_subclass(self, cls):
        """Itself as a Tensor; a class of its own has its own rules, which a tangent cannot follow."""
        if cls is Tensor or not self.dual_forward.active:
            return self if self.dual_forward.active else self.value.as_subclass(cls)
        raise NotImplementedError(f"Tensor.as_subclass({cls.__name__}) {DETACHED}")


def dual_forward(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The function's value with its graph, bit-equal to an ordinary call, and its directional derivative without graph.

    A tangent of None is zero and costs nothing; one with fewer rows (places of dimension 0) than its primal is zero in those left out, and
    these cost nothing either. Raises NotImplementedError, naming the operation, where a tangent cannot follow.
    """
    context = Context()
    args = [enter(p, t, context) for p, t in zip(apart_from_each_other(primals), tangents, strict=True)]
    try:
        with watched(carry, through_autograd_function, through_hidden):
            out = function(*args)
    finally:
        context.active = False
    if not isinstance(out, Tensor):
        raise ValueError(f"the function must return one tensor, got {type(out).__name__}")
    return (out.value, filled(out)) if type(out) is DualTensor else (out, torch.zeros_like(out, requires_grad=False))


def apart_from_each_other(primals: Sequence[Tensor]) -> list[Tensor]:
    """The primals, each an object of its own, by which its tangent is found."""
    return [p.view_as(p) if any(p is q for q in primals[:i]) else p for i, p in enumerate(primals)]


def enter(primal: Tensor, tangent: Tensor | None, context: Context) -> Tensor:
    """An argument as it enters a ride."""
    if type(primal) is DualTensor:
        if primal.dual_forward.active:
            raise NotImplementedError(
                "a ride inside a ride: second derivatives are not carried; use mode='forward' for the inner one"
            )
        primal = primal.value
    if tangent is None:
        return primal
    rows = None
    if tangent.shape != primal.shape:
        if tangent.shape[1:] != primal.shape[1:] or not (
            primal.ndim == tangent.ndim and 0 < len(tangent) < len(primal)
        ):
            raise ValueError(
                f"a tangent must have its primal's shape {tuple(primal.shape)}, or fewer rows, got {tuple(tangent.shape)}"
            )
        rows = Rows(-primal.ndim, len(tangent))
    return riding(primal, tangent.detach(), context, rows)


def riding(value: Tensor, tangent: Tensor, context: Context, rows: Rows | None = None) -> DualTensor:
    """The value, carrying the tangent. Operations see `value` itself, so their graph is the ordinary one and saves no tangent."""
    if tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype)
    shape = value.shape
    if rows is not None:
        shape = torch.Size([*shape[: rows.dim], rows.count, *shape[len(shape) + rows.dim + 1 :]])
    if tangent.shape != shape:
        tangent = tangent.expand(shape)
    x = value.as_subclass(DualTensor)
    x.value, x.tangent, x.dual_forward, x.rows = value, tangent, context, rows
    x.version = None if value.is_inference() else value._version
    return x


def carry(function: Callable, args: tuple, kwargs: dict):
    """What the function gives on the values, carrying the tangent that the function's rule gives."""
    duals: list[DualTensor] = []
    values, named = plain(args, duals), plain(kwargs, duals) if kwargs else kwargs
    live = [x for x in duals if x.dual_forward.active]
    if not live:
        return function(*values, **named)
    sound(live, function)
    rule = RULES.get(function)
    if rule is not None and named:
        values, named = in_torchs_words(rule, values, named)
    if (
        rule is None
        or named
        and named.get("out") is not None
        or type(function) is FunctionType
        and in_place_flag(function, values, named)
    ):
        return without_rule(function, args, values, named, live)
    if rule is dropout and draws(*values, **named):
        return by_torch(function, values, named, live)
    out = function(*values, **named)
    if (
        rule is constant or not has_derivative(out) and function is not Tensor.view
    ):  # whose rule refuses to reinterpret bits
        return out
    graded = is_graded()  # torch.no_grad, spelled out: this is the busiest place
    set_graded(False)
    try:
        tangent, rows = by_rule(rule, function, out, values, named, live)
    finally:
        set_graded(graded)
    return with_tangent(out, tangent, live[0].dual_forward, rows)


def by_rule(rule: Callable, function: Callable, out, args: tuple, kwargs: dict, live: list[DualTensor]):
    """(The tangent of out, the rows it is of): of those rows alone where the operation keeps them apart, by torch where the rule leaves it."""
    takes = accepts(rule, len(args), tuple(kwargs))
    if takes and len(live) > 1 and len({id(x.value) for x in live}) < len(live):
        args, kwargs, live = each_by_itself(args, kwargs, live)
    if takes and live[0].rows is not None and (part := apart(function, out, args, kwargs, live)) is not None:
        tangent = ask(rule, function, *part[:-1])
        if tangent is not NotImplemented:
            return tangent, part[-1]
    tangents = {id(x.value): filled(x) for x in live}
    tangent = ask(rule, function, out, args, kwargs, tangents) if takes else NotImplemented
    return forward_derivative(function, args, kwargs, tangents) if tangent is NotImplemented else tangent, None


def each_by_itself(args: tuple, kwargs: dict, live: list[DualTensor]):
    """The call with every mention of what rides an object of its own, so that a rule that looks at one mention has not looked at all."""
    duals, mentioned = {id(x.value): x for x in live}, []

    def mention(value: Tensor) -> Tensor:
        x = duals.get(id(value))
        if x is None:
            return value
        mentioned.append(riding(value.detach(), x.tangent, x.dual_forward, x.rows))
        return mentioned[-1].value

    return mapped(args, mention), mapped(kwargs, mention), mentioned


def plain(x, duals: list):
    """x with values in place of what rides, also inside lists, tuples and dicts; riders collects those replaced."""
    kind = type(x)
    if kind is DualTensor:
        duals.append(x)
        return x.value
    if kind in LEAVES:
        return x
    if kind is tuple or kind is list:
        return kind([plain(v, duals) for v in x])
    if isinstance(x, (tuple, list)) and kind is not torch.Size:  # a named tuple
        return tuple(plain(v, duals) for v in x)
    return {key: plain(v, duals) for key, v in x.items()} if isinstance(x, dict) else x


def sound(live: list[DualTensor], function: Callable) -> None:
    """Whether the tangents still belong to the values: none was overwritten through a view or .detach(), none is inside torch.func."""
    for x in live:
        if x.version is not None and x.value._version != x.version:
            raise NotImplementedError(
                f"{name_of(function)} gets a tensor that was written in place through another one: its tangent is not of it"
            )
    if transform() is not None and depth_of_transforms() > live[0].dual_forward.depth:
        raise NotImplementedError(
            f"{name_of(function)} inside {transform_name()} cannot be followed by a tangent: use mode='forward'"
        )


def depth_of_transforms() -> int:
    """How many of torch.func's transforms are under way."""
    return 0 if transform() is None else transform().level()


def transform_name() -> str:
    """The name of the innermost of torch.func's transforms."""
    return f"torch.func.{str(transform().key()).rpartition('.')[-1].lower()}"


def under_torch_func() -> bool:
    """Whether one of torch.func's transforms has called, which has left torch's stack of them when a kernel is reached."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch._functorch"):
        frame = frame.f_back
    return frame is not None


def in_torchs_words(rule: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call by keywords as the rules know them: numpy's names as torch's, the first argument by position."""
    if not accepts(rule, len(args), tuple(kwargs)):
        kwargs = {ALIASES.get(key, key): v for key, v in kwargs.items()}
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: v for key, v in kwargs.items() if key != "input"}
    return args, kwargs


def with_tangent(out, tangent, context: Context, rows: Rows | None = None):
    """The output, carrying its tangent; outputs that are tuples carry one each."""
    if tangent is None:
        return out
    if isinstance(out, Tensor):
        return riding(out, tangent, context, rows)
    if isinstance(out, Iterator):
        return iter([riding(v, t, context, rows) for v, t in zip(out, tangent, strict=True)])
    leaves, structure = tree_flatten(out)
    pairs = zip(leaves, tree_flatten(tangent)[0], strict=True)
    return tree_unflatten([v if t is None else riding(v, t, context, rows) for v, t in pairs], structure)


def draws(x, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether F.dropout, so called, draws random numbers."""
    return training and p > 0


def without_rule(function: Callable, args: tuple, values: tuple, named: dict, live: list[DualTensor]):
    """Torch's own derivative of one operation; NotImplementedError for writing in place and for taking numbers out of the ride."""
    if (
        short_name(function) == "__set__"
        and name_of(function) in (".requires_grad", ".grad")
        and type(args[1]) is not DualTensor
    ):
        return function(*values, **named)
    refuse_by_name(function, values, named)
    return by_torch(function, values, named, live)


def by_torch(function: Callable, args: tuple, kwargs: dict, live: list[DualTensor]):
    """The function on the values, then torch's forward derivative of it on the same random draw."""
    device = live[0].value.device
    before = random_state(device)
    out = function(*args, **kwargs)
    if out is None:
        return out
    if not has_derivative(out):
        raise NotImplementedError(
            f"{name_of(function)} gives {type(out).__name__} without a derivative, not known to be constant: .detach() first"
        )
    with replayed(before, device):
        return with_tangent(
            out,
            forward_derivative(function, args, kwargs, {id(x.value): filled(x) for x in live}),
            live[0].dual_forward,
        )


def through_hidden(name: str, function: Callable, args: tuple, kwargs: dict):
    """A function that torch hides from the ride: as_tensor and asarray are `to`; no tangent can follow the others."""
    duals: list[DualTensor] = []
    values, named = plain(args, duals), plain(kwargs, duals)
    if any(x.dual_forward.active for x in duals):
        raise NotImplementedError(f"{name} {DETACHED}")
    return function(*values, **named)


def through_autograd_function(cls: type[torch.autograd.Function], apply: Callable, args: tuple):
    """A Function with a jvp of its own takes it; torch's own plumbing (checkpointing, FSDP, DDP) is passed through; others are refused."""
    duals: list[DualTensor] = []
    values = plain(args, duals)
    duals = [x for x in duals if x.dual_forward.active]
    name = f"{cls.__module__}.{cls.__qualname__}"
    refusal = NotImplementedError(
        f"no tangent rule for the autograd.Function {name}: give it a jvp, or use mode='difference'"
    )
    if not duals:
        out = apply(*args)
        if any(type(x) is DualTensor and x.dual_forward.active for x in tree_flatten(out)[0]):
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
    return tree_unflatten([reentered(x) if type(x) is DualTensor else x for x in leaves], structure)


def reentered(x: DualTensor) -> DualTensor:
    """x, which an autograd.Function gave and torch has since joined to the graph, riding on with a value of that graph."""
    x.leaving = True
    with torch._C.DisableTorchFunctionSubclass():
        y = riding(Tensor.as_subclass(x, Tensor), x.tangent, x.dual_forward, x.rows)
        y.joint = Tensor.grad_fn.__get__(x)  # type: ignore[union-attr]  # torch annotates its descriptor as an attribute
    return y
