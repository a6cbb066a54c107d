"""Helpers for writing tangent rules.

A rule is a pure function `rule(op, out, *args, **kwargs)`: the operation, its output and its arguments, as ordinary
tensors with torch's argument names. T(argument) is the tangent of an argument, or None if it has none. A rule returns
the tangent of out (a tuple for a tuple), None if out is constant, or NotImplemented to use torch's forward derivative
instead. Rules run under no_grad and never write into a tangent, since tangents may share memory. A result counts only
if the rule has read the tangents of all dual arguments: a dual number where a rule expects a plain one (such as the
slope of leaky_relu) is never treated as a constant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Callable[..., Any]
PLACES = (torch, F, torch.special, torch.linalg)
NAMES: dict[Any, set[str]] = {place: set(dir(place)) for place in (Tensor, *PLACES)}  # they differ by torch version

ALIASES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}
"""NumPy's argument names, which torch accepts, and torch's own."""

TANGENTS: dict[int, Tensor] = {}
"""The tangents of the arguments of all calls in progress, by id of the value; threads share it, since ids differ."""
UNREAD: set[int] = set()
"""The keys of tangents that no rule has read yet."""


def ask(rule: Rule, function: Callable, out, args: tuple, kwargs: dict, tangents: dict[int, Tensor]):
    """The rule's result; NotImplemented if it did not read every tangent, or failed before it had."""
    TANGENTS.update(tangents)
    UNREAD.update(tangents)
    try:
        answer = rule(function, out, *args, **kwargs)
    except NotImplementedError:
        raise
    except Exception:  # such as a rule of one argument, called with another dual argument that it does not know
        if UNREAD.isdisjoint(tangents):
            raise
        answer = NotImplemented
    finally:
        complete = not UNREAD or UNREAD.isdisjoint(tangents)
        if not complete:
            UNREAD.difference_update(tangents)
        for key in tangents:
            del TANGENTS[key]
    return answer if complete else NotImplemented


@functools.lru_cache(maxsize=4096)
def accepts(rule: Callable, num_args: int, names: tuple[str, ...]) -> bool:
    """Whether a rule can be called with that many arguments after the first two, and these keywords."""
    try:
        inspect.signature(rule).bind(None, None, *[None] * num_args, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def torch_arguments(rule: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments as rules expect them: torch's names for NumPy's, and the first argument by position."""
    if not accepts(rule, len(args), tuple(kwargs)):
        kwargs = {ALIASES.get(key, key): v for key, v in kwargs.items()}
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: v for key, v in kwargs.items() if key != "input"}
    return args, kwargs


def T(x) -> Tensor | Any:
    """The tangent of x, or None. Rules that need not check for None fail with an exception, which `ask` catches."""
    key = id(x)
    UNREAD.discard(key)
    return TANGENTS.get(key)


def tangent_or_zero(x: Tensor) -> Tensor:
    """The tangent of x, or zeros."""
    t = T(x)
    return torch.zeros_like(x, requires_grad=False) if t is None else t


def every(rule: Rule, *names: str) -> dict[Callable, Rule]:
    """A table from every torch function with one of these names (torch.x, Tensor.x, F.x, ...) to the rule."""
    of_tensor = [(Tensor, name) for name in names]
    elsewhere = [(place, name) for place in PLACES for name in names if not name.startswith("__")]
    found = [getattr(place, name) for place, name in of_tensor + elsewhere if name in NAMES[place]]
    return {function: rule for function in found if callable(function)}


def getters(rule: Rule, *names: str) -> dict[Callable, Rule]:
    """A table from the getters of these tensor attributes to the rule."""
    return {getattr(Tensor, name).__get__: rule for name in names if name in NAMES[Tensor]}


def add_up(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not None; None if all are."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def constant(op, out, *args, **kwargs):
    """Out is piecewise constant, a property or a new tensor: it has no tangent, whatever the arguments."""
    for x in (*args, *kwargs.values()):
        T(x)


def same(op, out, x, *args, **kwargs):
    """Out is x."""
    return T(x)


def linear(op, out, x, *args, **kwargs):
    """Out is linear in x, the first argument: apply the same operation to the tangent."""
    t = T(x)
    return None if t is None else op(t, *args, **kwargs)


def shaped_like(op, out, x, *args, **kwargs):
    """Out is linear in x; another tensor only gives dtype or device (type_as, to)."""
    T(args[0] if args else kwargs.get("other"))
    return linear(op, out, x, *args, **kwargs)


def multilinear(op, out, *args, **kwargs):
    """Out is linear in each tensor argument: replace one at a time by its tangent and add up."""
    terms = [op(*args[:i], T(a), *args[i + 1 :], **kwargs) for i, a in enumerate(args) if T(a) is not None]
    return add_up(*terms)


def by_backward(kernel: Callable, t: Tensor, *args, **kwargs) -> Tensor:
    """t f'(x), elementwise, by torch's backward kernel, which multiplies by the conjugate of f'(x)."""
    return kernel(t.conj(), *args, **kwargs).conj() if t.is_complex() else kernel(t, *args, **kwargs)
