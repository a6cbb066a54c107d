"""Every operator of torch's own tests (OpInfo) in the dual forward: right, constant, or refused by name.

A form is a way of calling (as sampled, as a method, by keywords, in place, into out=), the dual tensors (each alone,
all, the first rows of all), the dtype (real, complex), and the values (as sampled; every second one 0, 1, inf, -inf).
Right is: equal to a central difference in float64. Where two differences disagree with each other (a kink, a jump,
infinite values) it is: equal to torch's own forward derivative of the whole call, wherever that is finite and a
difference is not. Slow; tests and benchmarks/operators.py use it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import get_testing_overrides
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent.dual import DualTensor, dual_forward

VALUES = (None, 0.0, 1.0, float("inf"), -float("inf"))
OUTCOMES = ("right", "constant", "refused", "wrong", "failed")
SKIPPED = {
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty_strided",
    "empty_permuted",
    "resize_",
    "resize_as_",  # uninitialised
}

LAPACK = (
    "linalg cholesky svd qr lu pinverse geqrf ormqr logdet matrix_exp triangular_solve norm lowrank corrcoef cov"
).split()
"""Parts of the names of what hands its matrices to LAPACK, which may crash on infinite ones."""


class Form(NamedTuple):
    """One way of calling an operator, and its dual tensors."""

    operator: str
    dtype: str
    way: str
    duals: str
    values: float | None
    sample: int


def operators() -> list:
    """torch's list of its own operators. It wants `expecttest`, of which it needs nothing but the name."""
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase, stand_in.assert_expected_inline = unittest.TestCase, None
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def is_number(x) -> bool:
    """A tensor that can be dual."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def ways(op, sample) -> Iterator[tuple[str, Callable, tuple, dict]]:
    """(name, function, args, kwargs) of each way of calling it."""
    args = (sample.input, *sample.args)
    yield "as sampled", op.op, args, sample.kwargs
    if op.method_variant is not None and isinstance(sample.input, Tensor):
        yield "method", op.method_variant, args, sample.kwargs
    names = keyword_names(op.op)
    if names and len(names) >= len(args):
        yield "by keywords", op.op, (), {**dict(zip(names, args, strict=False)), **sample.kwargs}
        if op.method_variant is not None and isinstance(sample.input, Tensor) and len(args) > 1:
            yield (
                "method, by keywords",
                op.method_variant,
                args[:1],
                {**dict(zip(names[1:], args[1:], strict=False)), **sample.kwargs},
            )
    if op.inplace_variant is not None and isinstance(sample.input, Tensor):
        yield "in place", lambda x, *args, **kwargs: op.inplace_variant(x.clone(), *args, **kwargs), args, sample.kwargs
    if op.supports_out:
        yield "into out=", into_out(op.op), args, sample.kwargs


def into_out(function: Callable) -> Callable:
    """The function with what it gives written into tensors made beforehand."""

    def call(*args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            shape = function(*unboarded(args), **unboarded(kwargs))
        new = [torch.empty(x.shape, dtype=x.dtype) for x in tree_flatten(shape)[0]]
        return function(*args, **kwargs, out=new[0] if isinstance(shape, Tensor) else tuple(new))

    return call


def unboarded(x):
    leaves, structure = tree_flatten(x)
    return tree_unflatten([v.value if type(v) is DualTensor else v for v in leaves], structure)


def keyword_names(function: Callable) -> list[str]:
    """The names that torch gives to a function's arguments."""
    stand_in = get_testing_overrides().get(function)
    if stand_in is None:
        return []
    parameters = inspect.signature(stand_in).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def as_vector(out) -> tuple[Tensor, bool, bool]:
    """Everything differentiable that a call gave, as one real vector; whether there is any, and in double precision."""
    leaves = [x for x in tree_flatten(list(out) if hasattr(out, "__next__") else out)[0] if is_number(x)]
    leaves = [x if x.layout == torch.strided else x.to_dense() for x in leaves]
    parts = [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).flatten().double() for x in leaves]
    double = all(x.dtype in (torch.float64, torch.complex128) for x in leaves)
    return (torch.cat(parts), True, double) if parts else (torch.zeros(1, dtype=torch.float64), False, double)


class Call:
    """An operator's call as a function of its dual tensors."""

    def __init__(self, function, args, kwargs, process, values, generator):
        self.leaves, self.structure = tree_flatten((args, kwargs))
        self.function, self.process = function, process
        self.places = [
            i
            for i, x in enumerate(self.leaves)
            if is_number(x) and x.layout == torch.strided and not x.is_conj() and not x.is_neg()
        ]
        for i in self.places:
            self.leaves[i] = with_values(self.leaves[i].detach(), values)
        self.primals = [self.leaves[i] for i in self.places]
        self.directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in self.primals]
        self.dual = self.numeric = self.double = False

    def __call__(self, *primals):
        torch.default_generator.manual_seed(0)
        leaves = list(self.leaves)
        for i, p in zip(self.places, primals, strict=True):
            leaves[i] = p
        args, kwargs = tree_unflatten(leaves, self.structure)
        out = self.function(*args, **kwargs)
        vector, self.numeric, self.double = as_vector(self.process(out))
        self.dual = type(vector) is DualTensor
        return vector

    def directions_of(self, chosen: list[int], rows: bool) -> list[Tensor | None]:
        """Tangents of the chosen primals, of their first rows only if so."""
        return [None if i not in chosen else v[:1] if rows else v for i, v in enumerate(self.directions)]


def with_values(x: Tensor, value: float | None) -> Tensor:
    """A copy of x, every second entry replaced."""
    x = x.clone(memory_format=torch.contiguous_format)
    if value is not None:
        x.view(-1)[::2] = value
    return x


def choices_of(call: Call) -> Iterator[tuple[str, list, list]]:
    """(name, tangents, the same in full) of each choice of dual tensors."""
    count = len(call.primals)
    for i in range(count if count > 1 else 0):
        tangents = call.directions_of([i], False)
        yield f"argument {i}", tangents, tangents
    full = call.directions_of(list(range(count)), False)
    yield "all", full, full
    long = [i for i, p in enumerate(call.primals) if p.ndim and len(p) > 1]
    if long:
        some = call.directions_of(long, True)
        yield (
            "first rows",
            some,
            [
                None if v is None else torch.cat([v, torch.zeros_like(p[1:])])
                for v, p in zip(some, call.primals, strict=True)
            ],
        )


def difference(call: Call, tangents: list, h: float) -> Tensor:
    """(f(p + h v) - f(p - h v)) / 2h; NaN where the call does not take one of these points."""
    try:
        return moved_apart(call, tangents, h)
    except Exception:
        return torch.full((1,), float("nan"), dtype=torch.float64)


def moved_apart(call: Call, tangents: list, h: float) -> Tensor:
    ahead, behind = moved(call, tangents, h), moved(call, tangents, -h)
    return (ahead - behind) / (2 * h)


def moved(call: Call, tangents: list, h: float) -> Tensor:
    """f(p + h v)."""
    return call(*[p if v is None else p + h * v for p, v in zip(call.primals, tangents, strict=True)])


def continuous(call: Call, tangents: list, h: float = 1e-6) -> bool:
    """Whether the value is between those on either side; false exactly at a jump with equal sides."""
    return close((moved(call, tangents, h) + moved(call, tangents, -h)) / 2, call(*call.primals))


def by_torch(call: Call, tangents: list) -> Tensor | None:
    """torch's forward derivative of the whole call; None where it has none."""
    try:
        with forward_ad.dual_level():
            out = call(
                *[p if v is None else forward_ad.make_dual(p, v) for p, v in zip(call.primals, tangents, strict=True)]
            )
            tangent = forward_ad.unpack_dual(out).tangent
            return torch.zeros_like(out) if tangent is None else tangent
    except Exception:
        return None


def near(got: Tensor, wanted: Tensor) -> Tensor:
    """Where they agree to what a difference with h = 1e-6 is good for."""
    scale = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 0.0
    return torch.isclose(got, wanted, rtol=1e-4, atol=1e-5 * (1 + scale))


def close(got: Tensor, wanted: Tensor) -> bool:
    """Whether they agree everywhere."""
    return got.shape == wanted.shape and bool(near(got, wanted).all())


def outcome(call: Call, tangents: list, full: list, value: float | None) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)."""
    try:
        out, rate = dual_forward(call, call.primals, tangents)
    except NotImplementedError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    good = "right" if call.dual else "constant"
    if not call.numeric:
        return good, ""
    if not torch.equal(torch.nan_to_num(out), torch.nan_to_num(call(*call.primals))):
        return "wrong", "another value"
    steps = [difference(call, full, h) for h in (1e-6, 1e-5)] if call.double else []
    if steps and close(rate, steps[0]):
        return good, ""
    wanted = by_torch(call, full)
    smooth = value is None and steps and bool(steps[0].isfinite().all()) and close(*steps) and continuous(call, full)
    if wanted is None or smooth:
        return (
            ("wrong", f"{rate.tolist()[:4]} for {steps[0].tolist()[:4]}")
            if smooth or call.dual
            else (good, "no reference")
        )
    same = wanted.shape == rate.shape and bool(
        (near(rate, wanted) | ~wanted.isfinite() | (near(rate, steps[0]) if steps else False)).all()
    )
    return (good, "") if same else ("wrong", f"{rate.tolist()[:6]} for torch's {wanted.tolist()[:6]}")


def forms(op, num_samples: int, values=VALUES) -> Iterator[tuple[Form, str, str]]:
    """(form, outcome, message) of an operator, on up to so many of torch's samples, the first ones and every third."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float64, torch.complex128):
        if dtype not in op.dtypes:
            continue
        torch.manual_seed(0)
        found = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 3 * num_samples))
        for number, sample in enumerate(found[:: max(1, len(found) // num_samples)][:num_samples]):
            for way, function, args, kwargs in ways(op, sample):
                structured = op.gradcheck_wrapper.__name__ != "<lambda>"  # of symmetric, triangular, ... matrices
                if structured and not args:
                    continue
                of = functools.partial(op.gradcheck_wrapper, function) if structured else function
                for value in values if way == "as sampled" else (None,):
                    if value is not None and abs(value) > 1 and any(part in op.name for part in LAPACK):
                        continue
                    call = Call(of, args, kwargs, sample.output_process_fn_grad, value, generator)
                    if call.primals and callable_on_plain(call):
                        for duals, tangents, full in choices_of(call):
                            form = Form(op.formatted_name, str(dtype).removeprefix("torch."), way, duals, value, number)
                            yield form, *outcome(call, tangents, full, value)


def callable_on_plain(call: Call) -> bool:
    """Whether torch itself takes the call."""
    try:
        call(*call.primals)
    except Exception:
        return False
    return True


def survey(
    ops: list, num_samples: int, values=VALUES, log: Callable | None = None
) -> tuple[list[tuple[Form, str, str]], Counter]:
    """Every form of these operators, and how often each outcome came."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in ops:
            if op.name not in SKIPPED:
                found += forms(op, num_samples, values)
                if log is not None:
                    log(op, found)
    return found, Counter(result for _, result, _ in found)
