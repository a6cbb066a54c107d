"""What torch does not hand to `__torch_function__` of a tensor meets the ride all the same while it is under way.

The call of torch.autograd.Function, of torch.jit.script and of a few functions and one setter of torch's own is replaced, and put back.
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
    """A ride's surroundings. through(function, args, kwargs) carries a call, through_autograd_function(class, apply, args) a Function's;
    through_hidden(name, function, args, kwargs) those that torch hides."""
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
    """The call of a hidden function."""
    return through(name, function, args, kwargs)


@contextmanager
def watched_data(through: Callable):
    """Inside, `y.data = x` of an ordinary y is seen."""
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
    """Inside, a torch.autograd.Function meets the ride: torch does not hand those to `__torch_function__`, so their `apply` is watched.

    `Function.apply` calls its parent's, which is where bound copies of `apply` pass as well; the parent is put back afterwards.
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
    """Inside, a torch.jit.script function meets the ride: torch does not hand those to `__torch_function__` either."""
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
    """A context in which torch.compile'd code runs as it was written, operation by operation: a ride cannot enter a compiled graph."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
