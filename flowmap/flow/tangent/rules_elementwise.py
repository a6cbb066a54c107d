"""Tangent rules of elementwise operations: arithmetic, activations, elementary functions.

For an elementwise y = f(x) the backward kernel g * f'(x) also computes the forward derivative, in one fused pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowmap.flow.tangent.rules_base import Rule, T, add_up, by_backward, constant, every, same, tangent_or_zero

aten = torch.ops.aten


def add(op, out, a, other, *, alpha=1):
    """d(a + alpha b)."""
    ta, tb = T(a), T(other)
    if tb is None:
        return ta
    if ta is None:
        return tb if alpha == 1 else tb * alpha
    return torch.add(ta, tb, alpha=alpha)


def subtract(op, out, a, other, *, alpha=1):
    """d(a - alpha b)."""
    ta, tb = T(a), T(other)
    if tb is None:
        return ta
    return tb * -alpha if ta is None else torch.sub(ta, tb, alpha=alpha)


def subtract_from(op, out, b, a):
    """d(a - b), written b.__rsub__(a)."""
    return subtract(op, out, a, b)


def multiply(op, out, a, other):
    """d(a b) = da b + a db."""
    ta, b, tb = T(a), other, T(other)
    if tb is None:
        return ta * b
    if ta is None:
        return a * tb
    if a.dtype == b.dtype:
        return torch.addcmul(ta * b, a, tb)
    return ta * b + a * tb


def divide(op, out, a, other, *, rounding_mode=None):
    """d(a / b) = (da - (a / b) db) / b; piecewise constant where the quotient is rounded."""
    if rounding_mode is not None:
        return constant(op, out, a, other)
    ta, b, tb = T(a), other, T(other)
    if tb is None:
        return ta / b
    return out * tb / -b if ta is None else torch.addcmul(ta, out, tb, value=-1) / b


def divide_into(op, out, b, a):
    """d(a / b), written b.__rtruediv__(a)."""
    return divide(op, out, a, b)


def reciprocal(op, out, x):
    return T(x) * out.square().neg_()


def add_product(op, out, x, tensor1, tensor2, *, value=1):
    """d(x + value a b)."""
    total = T(x)
    for left, right in ((T(tensor1), tensor2), (tensor1, T(tensor2))):
        if left is not None and right is not None:
            fused = total is not None and total.dtype == left.dtype == right.dtype
            total = torch.addcmul(total, left, right, value=value) if fused else add_up(total, value * (left * right))
    return total


def power(op, out, x, exponent):
    """d x^n = n x^(n-1) dx for a number n; a tensor of exponents is left to torch."""
    if isinstance(exponent, Tensor) or not isinstance(x, Tensor):
        return NotImplemented
    if exponent == 0:
        return constant(op, out, x)
    return T(x) * x * 2 if exponent == 2 else T(x) * x.pow(exponent - 1).mul_(exponent)


def negative(op, out, x):
    return -T(x)


def absolute(op, out, x):
    return NotImplemented if x.is_complex() else T(x) * x.sign()


def square(op, out, x):
    return T(x) * x * 2


def square_root(op, out, x):
    return T(x) / out * 0.5


def inverse_root(op, out, x):
    return T(x) * out.pow(3).mul_(-0.5)


def exponential(op, out, x):
    return T(x) * out


def exponential_minus_one(op, out, x):
    return T(x) * (out + 1)


def logarithm(op, out, x):
    return T(x) / x


def logarithm_one_plus(op, out, x):
    return T(x) / (x + 1)


def logit(op, out, x, eps=None):
    return aten.logit_backward(T(x), x, eps)


def hypotenuse(op, out, x, other):
    """d sqrt(x^2 + y^2) = (x dx + y dy) / out."""
    return add_up(*(None if T(v) is None else T(v) * (v / out) for v in (x, other)))


def sine(op, out, x):
    return T(x) * x.cos()


def cosine(op, out, x):
    return T(x) * x.sin().neg_()


def error_function(op, out, x):
    return T(x) * x.square().neg_().exp_().mul_(2 / math.sqrt(math.pi))


def sigmoid(op, out, x):
    return by_backward(aten.sigmoid_backward, T(x), out)


def tanh(op, out, x):
    return by_backward(aten.tanh_backward, T(x), out)


def silu(op, out, x, inplace=False):
    if x.is_complex():  # the backward kernel does not conjugate every factor
        s = torch.sigmoid(x)
        return T(x) * s * (1 + x * (1 - s))
    return aten.silu_backward(T(x), x)


def gelu(op, out, x, approximate="none"):
    return aten.gelu_backward(T(x), x, approximate=approximate)


def relu(op, out, x, inplace=False):
    return aten.threshold_backward(T(x), out, 0)


def leaky_relu(op, out, x, negative_slope=0.01, inplace=False):
    return aten.leaky_relu_backward(T(x), x, negative_slope, False)


def elu(op, out, x, alpha=1.0, inplace=False):
    return aten.elu_backward(T(x), alpha, 1.0, 1.0, False, x)


def softplus(op, out, x, beta=1.0, threshold=20.0):
    return aten.softplus_backward(T(x), x, beta, threshold)


def hardswish(op, out, x, inplace=False):
    return aten.hardswish_backward(T(x), x)


def mish(op, out, x, inplace=False):
    return aten.mish_backward(T(x), x)


def log_sigmoid(op, out, x):
    return T(x) * torch.sigmoid(-x)


def clamp(op, out, x, min=None, max=None):
    """The tangent inside the bounds, 0 outside, also for infinite tangents; dual bounds are left to torch.

    At a bound the result is torch's: the tangent of x, but 0 if a tensor is the only bound.
    """
    if min is None or max is None:
        bound, beyond, reached = (max, torch.gt, torch.ge) if min is None else (min, torch.lt, torch.le)
        return cut_off(T(x), (reached if isinstance(bound, Tensor) else beyond)(x, bound))
    if isinstance(min, Tensor) or isinstance(max, Tensor) or min > max:
        return cut_off(T(x), (x < min) | (x > max))
    return cut_off(T(x), out != x)


def cut_off(t: Tensor, outside: Tensor) -> Tensor:
    """t, and 0 outside."""
    return t.masked_fill(outside, 0) if outside.shape == t.shape else torch.where(outside, 0, t)


def at_least(op, out, x, min):
    """clamp_min."""
    return cut_off(T(x), x < min)


def at_most(op, out, x, max):
    """clamp_max."""
    return cut_off(T(x), x > max)


def greater(op, out, x, other):
    """maximum: the tangent of the greater argument, the mean of both if they are equal."""
    return of_either(x > other, x < other, x, other)


def lesser(op, out, x, other):
    """minimum: the tangent of the lesser argument, the mean of both if they are equal."""
    return of_either(x < other, x > other, x, other)


def greater_number(op, out, x, other):
    """fmax: the second of equal arguments, and the number if the other is NaN."""
    return of_either((x > other) | other.isnan(), (x <= other) | x.isnan(), x, other)


def lesser_number(op, out, x, other):
    """fmin: the first of equal arguments, and the number if the other is NaN."""
    return of_either((x <= other) | other.isnan(), (x > other) | x.isnan(), x, other)


def of_either(first: Tensor, second: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The tangent of x where `first`, that of `other` where `second`, else their mean."""
    a, b = (0 if t is None else t for t in (T(x), T(other)))
    return torch.where(first, a, torch.where(second, b, (a + b) / 2))


def without_nan(op, out, x, *args, **kwargs):
    """nan_to_num: replaced numbers are constant."""
    return T(x).masked_fill(~x.isfinite(), 0) if not x.is_complex() else NotImplemented


def where(op, out, condition, input=None, other=None):
    """torch.where: tangents are selected as the values are."""
    ta, tb = (0 if T(v) is None else T(v) for v in (input, other))
    return torch.where(condition, ta, tb)


def where_else(op, out, a, condition, other):
    """a.where(condition, b)."""
    return where(op, out, condition, a, other)


def filled_with(op, out, x, fill_value, *args, **kwargs):
    """full_like uses only the shape of x."""
    T(x)
    return None if T(fill_value) is None else T(fill_value)


def newly_filled(op, out, x, size, fill_value, *args, **kwargs):
    """x.new_full(size, value)."""
    return filled_with(op, out, x, fill_value)


def step_at_zero(op, out, x, values):
    """heaviside: constant but at 0, where it is `values`."""
    T(x)
    return None if T(values) is None else torch.where(x == 0, T(values), 0)


def masked_fill(op, out, x, mask, value):
    """Filled places take the tangent of the value."""
    if T(x) is None:
        return torch.where(mask, T(value), 0)
    return T(x).masked_fill(mask, 0) if T(value) is None else torch.where(mask, T(value), T(x))


def interpolate_between(op, out, a, end, weight):
    """d lerp(a, b, w) = lerp(da, db, w) + (b - a) dw."""
    steady = None
    if T(a) is not None or T(end) is not None:
        steady = torch.lerp(tangent_or_zero(a), tangent_or_zero(end), weight)
    return add_up(steady, None if T(weight) is None else (end - a) * T(weight))


ELEMENTWISE: dict[Callable, Rule] = {
    **every(add, "add", "__add__", "__radd__"),
    **every(subtract, "sub", "subtract", "__sub__"),
    **every(subtract_from, "__rsub__"),
    **every(multiply, "mul", "multiply", "__mul__", "__rmul__"),
    **every(divide, "div", "divide", "true_divide", "__truediv__", "__div__"),
    **every(divide_into, "__rtruediv__", "__rdiv__"),
    **every(reciprocal, "reciprocal"),
    **every(add_product, "addcmul"),
    **every(power, "pow", "__pow__"),
    **every(negative, "neg", "negative", "__neg__"),
    **every(same, "positive", "__pos__"),
    **every(absolute, "abs", "absolute", "__abs__"),
    **every(square, "square"),
    **every(square_root, "sqrt"),
    **every(inverse_root, "rsqrt"),
    **every(exponential, "exp"),
    **every(exponential_minus_one, "expm1"),
    **every(logarithm, "log"),
    **every(logarithm_one_plus, "log1p"),
    **every(logit, "logit"),
    **every(hypotenuse, "hypot"),
    **every(sine, "sin"),
    **every(cosine, "cos"),
    **every(error_function, "erf"),
    **every(sigmoid, "sigmoid", "expit"),
    **every(tanh, "tanh"),
    **every(silu, "silu"),
    **every(gelu, "gelu"),
    **every(relu, "relu"),
    **every(leaky_relu, "leaky_relu"),
    **every(elu, "elu"),
    **every(softplus, "softplus"),
    **every(hardswish, "hardswish"),
    **every(mish, "mish"),
    **every(log_sigmoid, "logsigmoid"),
    **every(clamp, "clamp", "clip"),
    **every(at_least, "clamp_min"),
    **every(at_most, "clamp_max"),
    **every(greater, "maximum"),
    **every(lesser, "minimum"),
    **every(greater_number, "fmax"),
    **every(lesser_number, "fmin"),
    **every(without_nan, "nan_to_num"),
    **every(filled_with, "full_like"),
    **every(newly_filled, "new_full"),
    **every(step_at_zero, "heaviside"),
    torch.where: where,
    Tensor.where: where_else,
    **every(masked_fill, "masked_fill"),
    **every(interpolate_between, "lerp"),
}
