"""The words in which tangent rules are written.

A rule is a pure function `rule(op, out, *args, **kwargs)`: op is the operation, out what it gave, the rest what it was given. It returns
the tangent of out (a tuple of them where out is a tuple), None where out carries no tangent, or NotImplemented to leave the case to torch's
own forward derivative. Inside a rule nothing is graded and an argument that rides is an ordinary tensor; T(argument) is its tangent, or None.
Rules never write into a tangent that they were given: tangents may share memory. A keyword that rides, or that a rule does not name, never
reaches it: the dispatcher leaves such a call to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Callable[..., Any]
PLACES = (torch, F, torch.special, torch.linalg)


def T(x) -> Tensor | None:
    """The tangent of x; None where x does not ride."""
    return getattr(x, "tangent", None)


def tangent_or_zero(x: Tensor) -> Tensor:
    """The tangent of x, in full."""
    t = T(x)
    return torch.zeros_like(x, requires_grad=False) if t is None else t


def every(rule: Rule, *names: str) -> dict[Callable, Rule]:
    """The table that sends every torch function of these names (torch.x, Tensor.x, F.x, ...) to the rule."""
    of_tensor = [(Tensor, name) for name in names]
    elsewhere = [(place, name) for place in PLACES for name in names if not name.startswith("__")]
    found = [getattr(place, name) for place, name in of_tensor + elsewhere if hasattr(place, name)]
    return {function: rule for function in found if isinstance(function, Callable)}


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
    """Out is piecewise constant, a property or a fresh tensor: it carries no tangent."""
    return None


def same(op, out, x, *args, **kwargs):
    """Out is x."""
    return T(x)


def linear(op, out, x, *args, **kwargs):
    """Out is linear in x, the first argument: the same operation takes tangent to tangent."""
    return None if T(x) is None else op(T(x), *args, **kwargs)


def multilinear(op, out, *args, **kwargs):
    """Out is linear in each tensor argument: replace one at a time by its tangent and add."""
    terms = [op(*args[:i], T(a), *args[i + 1 :], **kwargs) for i, a in enumerate(args) if T(a) is not None]
    return add_up(*terms)
