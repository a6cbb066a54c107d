"""A network's forward, compiled: plain calls as by torch.compile, dual ones with their derivative in the same graph.

The dual forward (dual.py) calls a Compiled as any function. If an argument is a dual tensor, its value and tangent go
to a compiled function, whose graph was made by the same table of rules (walk.py): one fused forward for both, one
backward for the value alone. What cannot be compiled runs as it is, and a line of the log says so.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from flowmap.flow.tangent.captured import is_dual, walked
from flowmap.flow.tangent.dual import Context, DualTensor, dual_tensor
from flowmap.flow.tangent.inductor import inductor, inductor_with_cuda_graphs
from flowmap.flow.tangent.rows import Rows
from flowmap.flow.tangent.walk import NotCaptured, enter, tangent_of

MOST_GRAPHS = 6
"""The number of graphs that a function is compiled to, plain and dual ones apart; other shapes run uncompiled.

Torch itself stops at 8.
"""

COUNTER = itertools.count()


class Moving(NamedTuple):
    """A value with its tangent, as an argument or a result of a compiled function."""

    value: Tensor
    tangent: Tensor
    dim: int | None


class Way:
    """One function, compiled at its first call and once more for shapes that do not fit.

    graphs: how many it has; seconds: what they took. stopped: why it is compiled no more, None while it is.
    in_rows: whether it has had tangents of some rows; those of all rows then use the same graph. Functions of modules
    of one class can share a Way: their parameters are inputs of its graph.
    """

    def __init__(self, function: Callable, name: str, log: Callable[[str], None], backend: Callable):
        self.function, self.name, self.log, self.backend = own(function), name, log, backend
        self.graphs, self.seconds, self.fallbacks = 0, 0.0, 0
        self.in_rows = False
        self.stopped: str | None = None
        self.compiled: Callable | None = None

    def __call__(self, eager: Callable, *args):
        """The compiled function of the arguments; eager() where it cannot be compiled."""
        if self.stopped is not None and not self.graphs:
            return self.without(eager)
        if self.compiled is None:
            torch._dynamo.allow_in_graph([enter, tangent_of])
            self.compiled = torch.compile(self.function, backend=self.build, fullgraph=True)
        known, started = self.graphs, time.perf_counter()
        try:
            with torch.compiler.set_stance("default" if self.stopped is None else "fail_on_recompile"):
                out = self.compiled(*args)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
            NotCaptured,
        ) as error:
            self.stop(reason_of(error))
            return self.without(eager)
        except RuntimeError as error:
            if self.stopped is None or "fail_on_recompile" not in str(error):
                raise
            return self.without(eager)
        if self.graphs > known:
            took = time.perf_counter() - started
            self.seconds += took
            self.log(f"compile: {self.name}: graph {self.graphs} in {took:.1f} s")
        return out

    def without(self, eager: Callable):
        self.fallbacks += 1
        return eager()

    def stop(self, reason: str) -> None:
        self.stopped = reason
        kept = f"; its {self.graphs} graphs stay" if self.graphs else ""
        self.log(f"compile: {self.name}: runs uncompiled{kept}: {reason}")

    def build(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        """The backend of torch.compile."""
        if self.graphs == MOST_GRAPHS:
            raise NotCaptured(f"more than {MOST_GRAPHS} different shapes or settings")
        out = self.backend(walked(graph) if is_dual(graph) else graph, inputs)
        self.graphs += 1
        if self.backend is inductor_with_cuda_graphs and any(isinstance(x, torch.SymInt) for x in inputs):
            self.log(f"compile: {self.name}: graph {self.graphs} has shapes that change: no CUDA graph")
        return out


class Compiled:
    """A function that is compiled, one way for plain tensors and one for dual ones.

    forward: the function. name and log: what lines about compiling call it, and where they go. like: another Compiled,
    of a module of the same class, whose graphs are used. part: the function is a part of a network, and what it returns
    has tangents of the same samples as its arguments; a whole network's are padded with zeros.
    """

    plain: Way
    dual: Way
    paused = 0
    """In how many contexts `uncompiled` the program is."""

    def __init__(
        self,
        forward: Callable,
        *,
        name: str = "network",
        log: Callable[[str], None] = lambda line: None,
        backend: Callable | None = None,
        like: Compiled | None = None,
        part: bool = False,
    ):
        backend = inductor if backend is None else backend
        self.forward = forward
        self.plain, self.dual = (
            like.ways
            if like is not None
            else (
                Way(plain_call, name, log, backend),
                Way(dual_call_of_part if part else dual_call, f"{name}, with derivative", log, backend),
            )
        )

    def __call__(self, *args, **kwargs):
        eager = lambda: self.forward(*args, **kwargs)
        if Compiled.paused or torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func's derivatives
            return eager()
        duals: list[DualTensor] = []
        given, named = moving(args, duals), moving(kwargs, duals)
        if self.plain.backend is not inductor_with_cuda_graphs:  # they have fixed shapes
            any_batch((given, named))
        if not duals:
            return self.plain(eager, self.forward, args, kwargs)
        if self.dual.in_rows or any(x.rows is not None for x in duals):
            self.dual.in_rows = True
            given, named = in_rows(given), in_rows(named)
        out = self.dual(eager, self.forward, given, named)
        return dual_again(out, duals[0].context)

    def __deepcopy__(self, memo: dict) -> Callable:
        """The function of the copied module, which is not compiled."""
        return copy.deepcopy(self.forward, memo)

    @property
    def ways(self) -> tuple[Way, Way]:
        """Those of plain and of dual calls."""
        return self.plain, self.dual


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which every Compiled runs as it is: for calls that are too few for a graph."""
    Compiled.paused += 1
    try:
        yield
    finally:
        Compiled.paused -= 1


def own(function: Callable) -> Callable:
    """The function with a code object and a name of its own.

    Torch keeps and counts its graphs by code object, and remembers by name which shapes have varied.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(COUNTER)}")
    return FunctionType(code, function.__globals__, function.__name__)


def reason_of(error: BaseException) -> str:
    """One line: the cause, and the place in the network where torch could not capture it."""
    cause: BaseException | None = error
    place = ""
    while cause is not None:
        error = cause
        if isinstance(error, torch._dynamo.exc.Unsupported):
            place = next((f" at {line.strip()}" for line in str(error).splitlines()[::-1] if "File " in line), "")
            break
        cause = error.__cause__ or getattr(error, "inner_exception", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{place}"[:300]


def plain_call(forward: Callable, args: tuple, kwargs: dict):
    """What is captured of a plain call."""
    return forward(*args, **kwargs)


def dual_call(forward: Callable, args: tuple, kwargs: dict):
    """What is captured of a dual call: markers show where tangents enter and leave."""
    found: list[Moving] = []
    values, named = entered(args, found), entered(kwargs, found)
    return paired(forward(*values, **named), None)


def dual_call_of_part(forward: Callable, args: tuple, kwargs: dict):
    """The same for a part of a network."""
    found: list[Moving] = []
    values, named = entered(args, found), entered(kwargs, found)
    return paired(forward(*values, **named), None if found[0].dim is None else found[0].tangent)


def entered(x, found: list[Moving]):
    """x with markers in place of Movings, which are collected."""
    if isinstance(x, Moving):
        found.append(x)
        return enter(x.value, x.tangent, x.dim)
    if isinstance(x, (tuple, list)):
        return type(x)([entered(v, found) for v in x])
    return {key: entered(v, found) for key, v in x.items()} if isinstance(x, dict) else x


def paired(x, like: Tensor | None):
    """x with a Moving in place of every tensor that can have a tangent: of its first rows, as many as `like` has."""
    if isinstance(x, Tensor):
        dim = None if like is None else -x.ndim
        return Moving(x, tangent_of(x, dim, like), dim) if x.is_floating_point() else x
    if isinstance(x, (tuple, list)):
        return type(x)([paired(v, like) for v in x])
    return {key: paired(v, like) for key, v in x.items()} if isinstance(x, dict) else x


def in_rows(x):
    """x with the tangents of all rows described as of the first ones, as many as there are."""
    if type(x) is Moving:
        return x if x.dim is not None or not x.value.ndim else Moving(x.value, x.tangent, -x.value.ndim)
    if type(x) is tuple or type(x) is list:
        return type(x)([in_rows(v) for v in x])
    return {key: in_rows(v) for key, v in x.items()} if isinstance(x, dict) else x


def any_batch(x) -> None:
    """Tell torch that the first dimension of the tensors in x varies: one graph is made for batches of any size."""
    if isinstance(x, Tensor):
        if x.ndim:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    elif isinstance(x, (tuple, list)):
        for v in x:
            any_batch(v)
    elif isinstance(x, dict):
        any_batch(tuple(x.values()))


def moving(x, duals: list[DualTensor]):
    """x with Movings in place of dual tensors, which are collected."""
    kind = type(x)
    if kind is DualTensor:
        duals.append(x)
        return Moving(x.value, x.tangent, None if x.rows is None else x.rows.dim)
    if kind is tuple or kind is list:
        return kind([moving(v, duals) for v in x])
    return {key: moving(v, duals) for key, v in x.items()} if isinstance(x, dict) else x


def dual_again(x, context: Context):
    """x with dual tensors in place of Movings, or plain ones if the dual forward has ended."""
    if type(x) is Moving:
        if not context.active:
            return x.value
        if x.dim is None or x.tangent.shape == x.value.shape:
            return dual_tensor(x.value, x.tangent, context)
        return dual_tensor(x.value, x.tangent, context, Rows(x.dim, x.tangent.shape[x.dim]))
    if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
        return type(x)([dual_again(v, context) for v in x])
    return {key: dual_again(v, context) for key, v in x.items()} if isinstance(x, dict) else x
