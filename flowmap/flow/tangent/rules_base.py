"""The words in which tangent rules are written.

A rule is a pure function `rule(op, out, *args, **kwargs)`: op is the operation, out what it gave, the rest what it was given, as ordinary
tensors, under the names that torch gives them. T(argument) is the tangent of an argument, or None where it does not ride. A rule returns
the tangent of out (a tuple of them where out is a tuple), None where out is constant, or NotImplemented to leave the case to torch's own
forward derivative. Inside a rule nothing is graded. Rules never write into a tangent that they were given: tangents may share memory.
An answer counts only if the rule has asked for the tangent of everything that rides: a number that rides where a rule expects a plain one
(the slope of a leaky_relu) is never taken for a constant.
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


TANGENTS: dict[int, Tensor] = {}
"""The tangents of what rides in calls whose rules are being asked, by id of the value: of every thread, since ids differ."""
UNREAD: set[int] = set()
"""Those of them at which their rule has not looked yet."""


def ask(rule: Rule, function: Callable, out, args: tuple, kwargs: dict, tangents: dict[int, Tensor]):
    """The rule's answer; NotImplemented where it did not look at every tangent, or failed before it had."""
    TANGENTS.update(tangents)
    UNREAD.update(tangents)
    try:
        answer = rule(function, out, *args, **kwargs)
    except NotImplementedError:
        raise
    except Exception:  # a rule whose first argument does not ride, but another does, of which it knows nothing
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
    """Whether a rule can be called with so many arguments after the first two, and these keywords."""
    try:
        inspect.signature(rule).bind(None, None, *[None] * num_args, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def T(x) -> Tensor | Any:
    """The tangent of x; None where x does not ride: what rules write about one that does fails then, and `ask` sees it."""
    key = id(x)
    UNREAD.discard(key)
    return TANGENTS.get(key)


def tangent_or_zero(x: Tensor) -> Tensor:
    """The tangent of x, in full."""
    t = T(x)
    return torch.zeros_like(x, requires_grad=False) if t is None else t


def every(rule: Rule, *names: str) -> dict[Callable, Rule]:
    """The table that sends every torch function of these names (torch.x, Tensor.x, F.x, ...) to the rule."""
    of_tensor = [(Tensor, name) for name in names]
    elsewhere = [(place, name) for place in PLACES for name in names if not name.startswith("__")]
    found = [getattr(place, name) for place, name in of_tensor + elsewhere if hasattr(place, name)]
    return {function: rule for function in found if callable(function)}


def getters(rule: Rule, *names: str) -> dict[Callable, Rule]:
    """The table that sends reading these attributes of a tensor to the rule."""
    return {getattr(Tensor, name).__get__: rule for name in names if hasattr(Tensor, name)}


def add_up(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that are not None."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def constant(op, out, *args, **kwargs):
    """Out is piecewise constant, a property or a fresh tensor, whatever rides: it carries no tangent."""
    for x in (*args, *kwargs.values()):
        T(x)


def same(op, out, x, *args, **kwargs):
    """Out is x."""
    return T(x)


def linear(op, out, x, *args, **kwargs):
    """Out is linear in x, the first argument: the same operation takes tangent to tangent."""
    t = T(x)
    return None if t is None else op(t, *args, **kwargs)


def shaped_like(op, out, x, *args, **kwargs):
    """Out is linear in x; of another tensor only shape, dtype and device matter (expand_as, type_as, to)."""
    T(args[0] if args else kwargs.get("other"))
    return linear(op, out, x, *args, **kwargs)


def multilinear(op, out, *args, **kwargs):
    """Out is linear in each tensor argument: replace one at a time by its tangent and add."""
    terms = [op(*args[:i], T(a), *args[i + 1 :], **kwargs) for i, a in enumerate(args) if T(a) is not None]
    return add_up(*terms)


def by_backward(kernel: Callable, t: Tensor, *args, **kwargs) -> Tensor:
    """t f'(x), elementwise, by torch's backward kernel, which multiplies by the conjugate of f'(x)."""
    return kernel(t.conj(), *args, **kwargs).conj() if t.is_complex() else kernel(t, *args, **kwargs)
