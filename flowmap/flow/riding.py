"""A tangent that rides: one graded forward, beside which a directional derivative is carried outside the graph.

A `Riding` tensor is a value with its tangent. Torch hands every function called on one to `__torch_function__`, which calls the function
as it is on the values (so graph, fused kernels, autocast and random draws are those of an ordinary forward) and a rule on the tangents under
no_grad. A tangent is never dropped in silence: an operation has a rule, or a forward derivative of torch's own, or is refused by name.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from flowmap.flow.riding_rows import Rows, apart, filled, partial
from flowmap.flow.rules import RULES
from flowmap.flow.rules_base import constant
from flowmap.flow.rules_nn import dropout

DRAWS = {function for function, rule in RULES.items() if rule is dropout}
IN_PLACE = "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __imatmul__ __ifloordiv__ __imod__".split()
ESCAPES = (
    "item tolist numpy data_ptr untyped_storage storage storage_type __array__ __float__ __int__ __index__ __complex__ __dlpack__ "
    "__deepcopy__ __reduce_ex__ share_memory_ backward grad"
).split()


class Ride:
    """One forward pass. Once it is over, what rode in it is a constant: activation checkpointing recomputes on such tensors, plainly."""

    def __init__(self):
        self.under_way = True


class Riding(Tensor):
    """A tensor with `value`, the ordinary tensor that operations see, and `tangent`, of its shape and dtype, without graph.

    Where `rows` is not None the tangent is that of the value's first rows alone (riding_rows.py).
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return carry(function, args, kwargs or {})


def ride(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The function's value with its graph, bit-equal to an ordinary call, and its directional derivative without graph.

    A tangent of None is zero and costs nothing; one with fewer rows (places of dimension 0) than its primal is zero in those left out, and
    these cost nothing either. Raises NotImplementedError, naming the operation, where a tangent cannot follow.
    """
    journey = Ride()
    args = [board(p, t, journey) for p, t in zip(primals, tangents, strict=True)]
    try:
        with watched_autograd_functions(), watched_scripts(), eagerly():
            out = function(*args)
    finally:
        journey.under_way = False
    if not isinstance(out, Tensor):
        raise ValueError(f"the function must return one tensor, got {type(out).__name__}")
    return (out.value, filled(out).tangent) if type(out) is Riding else (out, torch.zeros_like(out, requires_grad=False))


def board(primal: Tensor, tangent: Tensor | None, journey: Ride) -> Tensor:
    """An argument as it enters a ride."""
    if type(primal) is Riding:
        if primal.ride.under_way:
            raise NotImplementedError("a ride inside a ride: second derivatives are not carried; use mode='forward' for the inner one")
        primal = primal.value
    if tangent is None:
        return primal
    rows = None
    if tangent.shape != primal.shape:
        if tangent.shape[1:] != primal.shape[1:] or not (primal.ndim == tangent.ndim and 0 < len(tangent) < len(primal)):
            raise ValueError(f"a tangent must have its primal's shape {tuple(primal.shape)}, or fewer rows, got {tuple(tangent.shape)}")
        rows = Rows(-primal.ndim, len(tangent))
    return riding(primal, tangent.detach(), journey, rows)


def riding(value: Tensor, tangent: Tensor, journey: Ride, rows: Rows | None = None) -> Riding:
    """The value, carrying the tangent. Operations see `value` itself, so their graph is the ordinary one and saves no tangent."""
    if tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype)
    shape = value.shape
    if rows is not None:
        shape = [*shape[: rows.dim], rows.count, *shape[len(shape) + rows.dim + 1 :]]
    if tangent.shape != torch.Size(shape):
        tangent = tangent.expand(shape)
    x = value.as_subclass(Riding)
    x.value, x.tangent, x.ride, x.rows = value, tangent, journey, rows
    return x


def carry(function: Callable, args: tuple, kwargs: dict):
    """What the function gives on the values, carrying the tangent that the function's rule gives."""
    riders: list[Riding] = []
    values, named = plain(args, riders), plain(kwargs, riders)
    live = [x for x in riders if x.ride.under_way]
    if not live:
        return function(*values, **named)
    if len(live) < len(riders):
        args, kwargs = (tree_map_only(Riding, lambda x: x if x.ride.under_way else x.value, v) for v in (args, kwargs))
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: v for key, v in kwargs.items() if key != "input"}
    rule = RULES.get(function)
    if rule is None or kwargs.get("out") is not None or in_place_flag(function, args, kwargs):
        return without_rule(function, args, kwargs, values, named, live[0])
    if function in DRAWS and draws(*args, **kwargs):
        return by_torch(function, args, kwargs, values, named, live[0])
    out = function(*values, **named)
    if not has_derivative(out) and function is not Tensor.view:  # whose rule refuses to reinterpret bits
        return out
    tangent, rows = NotImplemented, None
    with torch.no_grad():
        named_by_rule = not kwargs or fits(rule, kwargs)
        if rule is not constant and partial(live):
            some = apart(function, out, args, kwargs, live) if named_by_rule else None
            if some is not None:
                part, some_args, some_kwargs, rows = some
                tangent = rule(function, part, *some_args, **some_kwargs)
            if tangent is NotImplemented:
                args, kwargs, rows = filled(args), filled(kwargs), None
        if tangent is NotImplemented and named_by_rule:
            tangent = rule(function, out, *args, **kwargs)
    if tangent is NotImplemented:
        tangent = forward_derivative(function, args, kwargs)
    return with_tangent(out, tangent, live[0].ride, rows)


def plain(x, riders: list):
    """x with values in place of what rides, also inside lists, tuples and dicts; riders collects those replaced."""
    kind = type(x)
    if kind is Riding:
        riders.append(x)
        return x.value
    if kind is tuple or kind is list:
        return kind([plain(v, riders) for v in x])
    if isinstance(x, (tuple, list)) and kind is not torch.Size:  # a named tuple
        return tuple(plain(v, riders) for v in x)
    return {key: plain(v, riders) for key, v in x.items()} if kind is dict else x


def fits(rule: Callable, kwargs: dict) -> bool:
    """Whether the rule names each keyword, or takes any and this one does not ride."""
    named, takes_any = keywords(rule)
    return all(key in named or (takes_any and not rides(v)) for key, v in kwargs.items())


@functools.cache
def keywords(rule: Callable) -> tuple[frozenset[str], bool]:
    """The parameters that a rule names, and whether it takes others."""
    parameters = inspect.signature(rule).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


def rides(x) -> bool:
    """Whether something in x carries a tangent."""
    riders: list[Riding] = []
    plain(x, riders)
    return bool(riders)


def has_derivative(out) -> bool:
    """Whether an output has numbers that a tangent could belong to."""
    if isinstance(out, Tensor):
        return out.is_floating_point() or out.is_complex()
    return isinstance(out, (tuple, list)) and any(has_derivative(v) for v in out) or hasattr(out, "__next__")


def with_tangent(out, tangent, journey: Ride, rows: Rows | None = None):
    """The output, carrying its tangent; outputs that are tuples carry one each."""
    if tangent is None:
        return out
    if isinstance(out, Tensor):
        return riding(out, tangent, journey, rows)
    if hasattr(out, "__next__"):
        return iter([riding(v, t, journey, rows) for v, t in zip(out, tangent, strict=True)])
    leaves, structure = tree_flatten(out)
    pairs = zip(leaves, tree_flatten(tangent)[0], strict=True)
    return tree_unflatten([v if t is None else riding(v, t, journey, rows) for v, t in pairs], structure)


def short_name(function: Callable) -> str:
    """The function's bare name; scripted functions keep it elsewhere."""
    return getattr(function, "__name__", None) or getattr(function, "name", type(function).__name__)


def name_of(function: Callable) -> str:
    """The name by which a user knows the function: .data for reading an attribute, torch's name of an operation."""
    owner = getattr(function, "__self__", None)
    if short_name(function) in ("__get__", "__set__") and owner is not None:
        return f".{owner.__name__}"
    if "torch._ops" in type(function).__module__:
        return str(function)
    name = getattr(function, "__qualname__", short_name(function))
    return name.replace("TensorBase.", "Tensor.").replace("_VariableFunctionsClass.", "torch.")


@functools.lru_cache(maxsize=1024)
def in_place_position(function: FunctionType) -> int | None:
    """Where the function takes its `inplace` flag; None if it has none."""
    names = list(inspect.signature(function, follow_wrapped=False).parameters)
    return names.index("inplace") if "inplace" in names else None


def in_place_flag(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether the caller asks for the result to be written over the argument."""
    position = in_place_position(function) if type(function) is FunctionType else None  # built-ins have no flag
    return bool(position is not None and kwargs.get("inplace", args[position] if len(args) > position else False))


def writes_in_place(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether the call overwrites one of its arguments, by torch's naming, by flag, by out= or by its schema."""
    short, schema = short_name(function), getattr(getattr(function, "default", function), "_schema", None)
    trailing = short in IN_PLACE or (short.endswith("_") and not short.endswith("__"))
    return trailing or getattr(schema, "is_mutable", False) or kwargs.get("out") is not None or in_place_flag(function, args, kwargs)


def draws(x, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether F.dropout, so called, draws random numbers."""
    return training and p > 0


def without_rule(function, args, kwargs, values, named, rider: Riding):
    """Torch's own derivative of one operation; NotImplementedError for writing in place and for taking numbers out of the ride."""
    name, short = name_of(function), short_name(function)
    if short == "__set__" and name in (".requires_grad", ".grad"):
        return function(*values, **named)
    if writes_in_place(function, args, kwargs):
        raise NotImplementedError(f"{name} writes in place or into out=, which a tangent cannot follow: use the form that returns a new tensor")
    if short in ("__get__", "__set__") or short in ESCAPES:
        raise NotImplementedError(f"{name} takes numbers out of the ride without their tangent: .detach() says that a constant is meant")
    return by_torch(function, args, kwargs, values, named, rider)


def by_torch(function, args, kwargs, values, named, rider: Riding):
    """The function on the values, then torch's forward derivative of it on the same random draw."""
    args, kwargs = filled((args, kwargs))
    before = random_state(rider.value.device)
    out = function(*values, **named)
    if not has_derivative(out):
        return out
    with replayed(before, rider.value.device):
        return with_tangent(out, forward_derivative(function, args, kwargs), rider.ride)


def forward_derivative(function: Callable, args: tuple, kwargs: dict):
    """The tangent of one operation by torch's forward mode, attention in elementary operations. NotImplementedError names what has none."""
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = lambda x: forward_ad.make_dual(x.value, x.tangent)
            out = function(*tree_map_only(Riding, dual, args), **tree_map_only(Riding, dual, kwargs))
            leaves, structure = tree_flatten(out)
            tangents = [forward_ad.unpack_dual(v).tangent if has_derivative(v) else None for v in leaves]
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(f"no tangent rule for {name_of(function)}, and torch has no forward derivative of it: {error}") from error
    if any(t is None and has_derivative(v) for t, v in zip(tangents, leaves, strict=True)):
        raise NotImplementedError(f"no tangent rule for {name_of(function)}, and torch has no forward derivative of it")
    return tree_unflatten(tangents, structure)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the generators that an operation on this device may draw from."""
    return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """The generators, put back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextmanager
def replayed(before: tuple[Tensor, Tensor | None], device: torch.device):
    """Inside, the generators give again what they gave since `before`; afterwards they go on as if nothing had been replayed."""
    after = random_state(device)
    set_random_state(before, device)
    try:
        yield
    finally:
        set_random_state(after, device)


@contextmanager
def watched_autograd_functions():
    """Inside, a torch.autograd.Function meets the ride: torch does not hand those to `__torch_function__`, so their `apply` is watched.

    `Function.apply` calls its parent's, which is where bound copies of `apply` pass as well; the parent is put back afterwards.
    """
    parent = torch.autograd.Function.__mro__[1]
    inherited = parent.__mro__[1].__dict__["apply"].__get__
    own = parent.__dict__.get("apply")
    parent.apply = classmethod(lambda cls, *args: through_autograd_function(cls, functools.partial(inherited(None, cls)), args))
    try:
        yield
    finally:
        if own is None:
            del parent.apply
        else:
            parent.apply = own


@contextmanager
def watched_scripts():
    """Inside, a torch.jit.script function meets the ride: torch does not hand those to `__torch_function__` either."""
    script = torch.jit.ScriptFunction
    ordinary = script.__call__

    def call(self, *args, **kwargs):
        run = lambda *args, **kwargs: ordinary(self, *args, **kwargs)
        run.__qualname__ = f"torch.jit.script {self.name}"
        return Riding.__torch_function__(run, (), args, kwargs)

    script.__call__ = call
    try:
        yield
    finally:
        script.__call__ = ordinary


def eagerly():
    """A context in which torch.compile'd code runs as it was written, operation by operation: a ride cannot enter a compiled graph."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def through_autograd_function(cls: type, apply: Callable, args: tuple):
    """A Function with a jvp of its own takes it; torch's own plumbing (checkpointing, FSDP, DDP) is passed through; others are refused."""
    riders: list[Riding] = []
    values = plain(args, riders)
    riders = [x for x in riders if x.ride.under_way]
    if not riders:
        return apply(*args)
    if cls.jvp is not torch.autograd.Function.jvp:
        return by_torch(apply, args, {}, values, {}, riders[0])
    name = f"{cls.__module__}.{cls.__qualname__}"
    refusal = NotImplementedError(f"no tangent rule for the autograd.Function {name}: give it a jvp, or use mode='difference'")
    if not cls.__module__.startswith("torch."):
        raise refusal
    leaves, structure = tree_flatten(apply(*args))
    if any(has_derivative(x) and type(x) is not Riding for x in leaves):
        raise refusal
    return tree_unflatten([reboarded(x) if type(x) is Riding else x for x in leaves], structure)


def reboarded(x: Riding) -> Riding:
    """x, which an autograd.Function gave and torch has since joined to the graph, riding on with itself as value."""
    tangent, journey, rows = x.tangent, x.ride, x.rows
    x.__class__ = Tensor
    x.__dict__.clear()
    return riding(x, tangent, journey, rows)
