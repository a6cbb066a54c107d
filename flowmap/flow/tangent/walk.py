"""The dual forward of a captured graph: every node is run with its tangent by the same rules as in the eager one.

torch.compile captures a network as a graph of torch functions. A Walk runs that graph for AOTAutograd, which traces
what it does: the values with their graph, the tangents under no_grad. Inside that trace tensors cannot be DualTensors,
so a Traced is a plain record of a value and its tangent. Markers in the graph say where tangents enter and leave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent.dual import by_rule
from flowmap.flow.tangent.opened import OPENED
from flowmap.flow.tangent.refused import name_of, refuse_by_name, writes_in_place
from flowmap.flow.tangent.rows import Rows, filled
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import constant, torch_arguments
from flowmap.flow.tangent.rules_nn import dropout
from flowmap.flow.tangent.torch_functions import draws, has_derivative

OPERATORS: dict[Callable, str] = {
    getattr(operator, name): f"__{name}__"
    for name in "add sub mul truediv floordiv mod pow matmul neg pos abs getitem eq ne lt le gt ge and_ or_".split()
}
"""Operators as dynamo writes them, and the method of Tensor that is in the table of rules."""
WRITES: dict[Callable, str] = {
    getattr(operator, name): f"__{name}__" for name in "iadd isub imul itruediv ipow imatmul setitem".split()
}


@dataclass(eq=False)
class Traced:
    """A value with its tangent; `rows` as in a DualTensor."""

    value: Tensor
    tangent: Tensor
    rows: Rows | None


class NotCaptured(RuntimeError):
    """A marker was called as an ordinary function: torch did not compile the call."""


def enter(x: Tensor, tangent: Tensor, dim: int | None) -> Tensor:
    """Marker: x with this tangent from here on; with `dim`, it is of the first rows of that dimension."""
    must_be_fake(x)
    return x.view_as(x)


def tangent_of(x: Tensor, dim: int | None, like: Tensor | None) -> Tensor:
    """Marker: the tangent of x, of its shape; with `dim`, of as many rows as `like` has."""
    must_be_fake(x)
    return without_tangent(x, dim, like)


def must_be_fake(x: Tensor) -> None:
    """Raise NotCaptured for a tensor with numbers: markers mean something in a captured graph alone."""
    if not isinstance(x, FakeTensor):
        raise NotCaptured("torch.compile is switched off")


def without_tangent(x: Tensor, dim: int | None, like: Tensor | None) -> Tensor:
    """The tangent of a constant."""
    x = x.detach()
    return torch.zeros_like(x if dim is None or like is None else x.narrow(dim, 0, like.shape[0]))


class Walk(fx.Interpreter):
    """Runs a captured graph on plain tensors; raises NotImplementedError where no tangent can follow."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.graph_module, self.written = graph, written_memory(graph)

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if type(out) is Traced and self.written and memory_of(n) in self.written:
            raise NotImplementedError(f"{n.name} has a tangent and is written in place")
        return out

    def fetch_args_kwargs_from_env(self, n: fx.Node):
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return changed(args, lambda x: x), changed(kwargs, lambda x: x)

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if target is enter:
            x, tangent, dim = args
            return traced(x, tangent, None if dim is None else Rows(dim, tangent.shape[dim]))
        if target is tangent_of:
            return outgoing(*args)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return higher_order(target, args, kwargs)
        if target is getattr:
            return carry(getattr(Tensor, args[1]).__get__, args[:1], {}) if is_traced(args[0]) else getattr(*args)
        if target is torch.as_tensor and is_traced(args[0]):  # an eager call returns the tensor itself
            return carry(Tensor.to, (args[0],), kwargs) if kwargs else args[0]
        if target is operator.getitem and not isinstance(args[0], (Tensor, Traced)):
            return args[0][args[1]]
        if target in OPERATORS or target in WRITES:
            return by_operator(target, args)
        return carry(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        owner = args[0].value if is_traced(args[0]) else args[0]
        if not isinstance(owner, Tensor):
            return getattr(owner, target)(*args[1:], **kwargs)
        return carry(getattr(Tensor, target), args, kwargs)

    def output(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return changed(args[0], lambda x: x.value if is_traced(x) else x)


def is_traced(x) -> bool:
    return type(x) is Traced


def traced(value: Tensor, tangent: Tensor, rows: Rows | None) -> Traced:
    """The value with a tangent in its dtype and in its shape, apart from rows."""
    shape = list(value.shape)
    if rows is not None:
        shape[rows.dim] = rows.count
    with torch.no_grad():
        return Traced(value, tangent.to(value.dtype).expand(shape), rows)


def outgoing(x: Traced | Tensor, dim: int | None, like: Tensor | None) -> Tensor:
    """What the marker tangent_of stands for; NotImplementedError where samples mix, so that all rows have a tangent."""
    with torch.no_grad():
        if not isinstance(x, Traced):
            return without_tangent(x, dim, like)
        if dim is None:
            return filled(x).contiguous()
        if x.rows is None or x.rows.dim != dim:
            raise NotImplementedError("an operation mixes the samples of a batch of which some have no tangent")
        return x.tangent.contiguous()


def by_operator(target: Callable, args: tuple) -> Any:
    """An operator of Python, as the method of Tensor that has a rule."""
    if not any(is_traced(x) for x in leaves_of(args)):
        return target(*args)
    name = (OPERATORS | WRITES)[target]
    if isinstance(args[0], (Tensor, Traced)):
        return carry(getattr(Tensor, name), args, {})
    return carry(getattr(Tensor, name.replace("__", "__r", 1)), args[::-1], {})


def changed(x, change: Callable):
    """x with `change` applied to what is in its tuples, lists, dicts and slices, which become ordinary ones."""
    if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
        values = [changed(v, change) for v in x]
        return values if isinstance(x, list) else tuple(values)
    if isinstance(x, dict):
        return {key: changed(v, change) for key, v in x.items()}
    if isinstance(x, slice):
        return slice(*(changed(v, change) for v in (x.start, x.stop, x.step)))
    return change(x)


def leaves_of(x) -> list:
    """The leaves of nested tuples, lists, dicts and slices."""
    found: list = []
    changed(x, found.append)
    return found


def carry(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The function's output on the values, with its tangent if an argument has one."""
    duals = [x for x in leaves_of((args, kwargs)) if is_traced(x)]
    value_of = lambda x: x.value if is_traced(x) else x
    values, named = changed(args, value_of), changed(kwargs, value_of)
    if not duals:
        return function(*values, **named)
    rule = RULES.get(function)
    if rule is None and function in OPENED:
        return opened_body(function, args, kwargs)
    if rule is None:
        refuse_by_name(function, values, named)
    elif named:
        values, named = torch_arguments(rule, values, named)
    if writes_in_place(function, values, named):
        raise NotImplementedError(f"{name_of(function)} writes in place")
    if rule is dropout and draws(*values, **named):
        return dropped(duals[0], *values[1:], **named)
    out = function(*values, **named)
    if rule is constant or not has_derivative(out) and function is not Tensor.view:
        return out
    with torch.no_grad():
        args, kwargs, live = distinct_arguments(args, kwargs)
        if rule is not None and kwargs:
            args, kwargs = torch_arguments(rule, args, kwargs)
        if rule is None:
            tangent, rows = without_draws(function, out, args, kwargs, live), None
        else:
            tangent, rows = by_rule(rule, function, out, args, kwargs, live)
    return with_tangent(out, tangent, rows)


def distinct_arguments(args: tuple, kwargs: dict) -> tuple[tuple, dict, list[Any]]:
    """The values, a distinct object for each occurrence of a dual one, and their records: rules look up by object."""
    live: list[Traced] = []

    def value_of(x):
        if not is_traced(x):
            return x
        again = any(x.value is other.value for other in live)
        live.append(replace(x, value=x.value.detach()) if again else x)
        return live[-1].value

    return changed(args, value_of), changed(kwargs, value_of), live


class NoDraws(TorchDispatchMode):
    """Raises for kernels that draw random numbers: the derivative would see others than the value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotImplementedError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def without_draws(function: Callable, out, args: tuple, kwargs: dict, live: list[Any]):
    """The tangent by torch's forward derivative of the function, which must not draw."""
    if any(x.value.ndim == 0 for x in live):
        raise NotImplementedError(f"no tangent rule for {name_of(function)} of a number")
    with NoDraws():
        return by_rule(lambda op, out, *args, **kwargs: NotImplemented, function, out, args, kwargs, live)[0]


def with_tangent(out, tangent, rows: Rows | None):
    """The output with its tangent; a tuple's entries get one each."""
    if tangent is None:
        return out
    if isinstance(out, Tensor):
        return traced(out, tangent, rows)
    leaves, structure = tree_flatten(out)
    pairs = zip(leaves, tree_flatten(tangent, is_leaf=lambda x: x is None)[0], strict=True)
    return tree_unflatten([v if t is None else traced(v, t, rows) for v, t in pairs], structure)


def dropped(x: Traced, p: float = 0.5, training: bool = True, inplace: bool = False) -> Traced:
    """Dropout of the value, and of the tangent with the same mask."""
    out, mask = torch.native_dropout(x.value, p, training)
    with torch.no_grad():
        kept = mask if x.rows is None else mask.narrow(x.rows.dim, 0, x.rows.count)
        return traced(out, x.tangent * kept * (0.0 if p == 1 else 1 / (1 - p)), x.rows)


def opened_body(function: Callable, args: tuple, kwargs: dict) -> Any:
    """A function of torch that is made of others, each of which is carried."""
    value_of = lambda x: x.value if is_traced(x) else x
    given = {id(x.value): x for x in leaves_of((args, kwargs)) if is_traced(x)}
    with Carrying(given) as mode:
        out = OPENED[function](*changed(args, value_of), **changed(kwargs, value_of))
    return changed(out, lambda x: mode.records.get(id(x), x))


class Carrying(TorchFunctionMode):
    """A mode in which every torch function is carried; records are kept by the id of their value, and keep it alive."""

    def __init__(self, records: dict[int, Traced]):
        super().__init__()
        self.records = records

    def __torch_function__(self, func, types, args=(), kwargs=None):
        entered = lambda x: self.records.get(id(x), x) if isinstance(x, Tensor) else x
        out = carry(func, changed(args, entered), changed(kwargs or {}, entered))
        return changed(out, self.value_of)

    def value_of(self, x):
        if not is_traced(x):
            return x
        self.records[id(x.value)] = x
        return x.value


def higher_order(target: Any, args: tuple, kwargs: dict) -> Any:
    """Activation checkpointing: its graph is walked inside the same checkpoint. Others must not meet a tangent."""
    if not any(is_traced(x) for x in leaves_of((args, kwargs))):
        return target(*args, **kwargs)
    if target is not torch.ops.higher_order.tag_activation_checkpoint:
        raise NotImplementedError(f"no tangent rule for the captured {target}")
    graph, given = args[0], args[1:]
    moving = [x for x in given if is_traced(x)]
    shown: list = []

    def inside(*flat):
        values, tangents = list(flat[: len(given)]), iter(flat[len(given) :])
        for i, x in enumerate(given):
            if is_traced(x):
                values[i] = traced(values[i], next(tangents), x.rows)
        outs = Inside(graph).run(*values)
        shown[:] = [x.rows if is_traced(x) else False for x in outs]
        return tuple(v for x in outs for v in ((x.value, x.tangent) if is_traced(x) else (x,)))

    values = [x.value if is_traced(x) else x for x in given]
    flat = iter(
        target(as_graph(inside, graph, len(given) + len(moving)), *values, *(x.tangent for x in moving), **kwargs)
    )
    return tuple(next(flat) if rows is False else Traced(next(flat), next(flat).detach(), rows) for rows in shown)


class Inside(Walk):
    """A walk of a graph within a graph: its outputs keep their tangents."""

    def output(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args[0]


def as_graph(call: Callable, like: fx.GraphModule, num_inputs: int) -> fx.GraphModule:
    """A graph of one node, the call."""
    graph = fx.Graph()
    graph.output(graph.call_module("walk", tuple(graph.placeholder(f"x{i}") for i in range(num_inputs))))
    module = fx.GraphModule({"walk": Calls(call)}, graph)
    module.meta = dict(like.meta)
    return module


class Calls(torch.nn.Module):
    """A function as a module, which a graph can call."""

    def __init__(self, call: Callable):
        super().__init__()
        self.call = call

    def forward(self, *args):
        return self.call(*args)


def memory_of(node: fx.Node) -> int | None:
    """The memory of the node's value when it was captured."""
    example = node.meta.get("example_value")
    return example.untyped_storage()._cdata if isinstance(example, Tensor) else None


def written_memory(graph: fx.GraphModule) -> set[int]:
    """The memory that nodes of the graph write in place."""
    found: set[int | None] = set()
    for node in graph.graph.nodes:
        function: Any = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
        if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if function in WRITES or callable(function) and writes_in_place(function, node.args, node.kwargs):
            found.add(memory_of(node.args[0]))
    return {x for x in found if x is not None}
