"""Patches that route calls which torch does not pass to `__torch_function__` through the dual forward while it runs.

These are calls of torch.autograd.Function and torch.jit.script, and a few functions and one setter of torch. All
patches are removed afterwards.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

OWN_BACKWARD = [
    (torch.autograd, "backward"),
    *((torch.autograd.functional, name) for name in "vjp jvp jacobian hessian vhp hvp".split()),
]
EXPORTS = [(torch.utils.dlpack, "to_dlpack"), (torch._C, "_to_dlpack")]
HIDDEN = OWN_BACKWARD + EXPORTS


@contextmanager
def watched(through: Callable, through_autograd_function: Callable, through_hidden: Callable):
    """A context with all patches.

    through(function, args, kwargs) handles a scripted function, through_autograd_function(class, apply, args) an
    autograd.Function, through_hidden(name, function, args, kwargs) one of HIDDEN or the setter of .data.
    """
    with ExitStack() as stack:
        stack.enter_context(watched_autograd_functions(through_autograd_function))
        stack.enter_context(watched_scripts(through))
        stack.enter_context(watched_data(through_hidden))
        stack.enter_context(eagerly())
        ordinary = [getattr(owner, name) for owner, name in HIDDEN]
        for (owner, name), function in zip(HIDDEN, ordinary, strict=True):
            setattr(owner, name, functools.partial(hidden, through_hidden, f"{owner.__name__}.{name}", function))
        try:
            yield
        finally:
            for (owner, name), function in zip(HIDDEN, ordinary, strict=True):
                setattr(owner, name, function)


def hidden(through: Callable, name: str, function: Callable, *args, **kwargs):
    """Call one of HIDDEN."""
    return through(name, function, args, kwargs)


@contextmanager
def watched_data(through: Callable):
    """A context in which `y.data = x` is handled, also for an ordinary tensor y."""
    data: Any = Tensor.data
    seen: Any = property(
        lambda x: through(".data", data.__get__, (x,), {}), lambda y, x: through(".data", data.__set__, (y, x), {})
    )
    Tensor.data = seen
    try:
        yield
    finally:
        del Tensor.data


@contextmanager
def watched_autograd_functions(through: Callable):
    """A context in which torch.autograd.Functions are handled, by patching `apply` of their parent class.

    `Function.apply` calls its parent's, and so do bound references to `apply`.
    """
    parent: Any = torch.autograd.Function.__mro__[1]
    inherited = parent.__mro__[1].__dict__["apply"].__get__
    own = parent.__dict__.get("apply")
    parent.apply = classmethod(lambda cls, *args: through(cls, functools.partial(inherited(None, cls)), args))
    try:
        yield
    finally:
        if own is None:
            del parent.apply
        else:
            parent.apply = own


@contextmanager
def watched_scripts(through: Callable):
    """A context in which calls of torch.jit.script functions are handled."""
    script: Any = torch.jit.ScriptFunction
    ordinary = script.__call__

    def call(self, *args, **kwargs):
        run = lambda *args, **kwargs: ordinary(self, *args, **kwargs)
        run.__qualname__ = f"torch.jit.script {self.name}"
        with torch._C.DisableTorchFunctionSubclass():
            return through(run, args, kwargs)

    script.__call__ = call
    try:
        yield
    finally:
        script.__call__ = ordinary


def eagerly():
    """A context in which compiled functions run eagerly: a dual forward cannot follow a compiled graph."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
