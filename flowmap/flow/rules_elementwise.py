"""Tangent rules of what acts on each number by itself: arithmetic, activations, elementary functions.

For an elementwise y = f(x) the backward kernel g * f'(x) is the forward derivative too, in one fused pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowmap.flow.rules_base import T, add_up, constant, every, same, tangent_or_zero

aten = torch.ops.aten


def add(op, out, a, b, *, alpha=1):
    """d(a + alpha b)."""
    if T(b) is None:
        return T(a)
    if T(a) is None:
        return T(b) if alpha == 1 else T(b) * alpha
    return torch.add(T(a), T(b), alpha=alpha)


def subtract(op, out, a, b, *, alpha=1):
    """d(a - alpha b)."""
    if T(b) is None:
        return T(a)
    return T(b) * -alpha if T(a) is None else torch.sub(T(a), T(b), alpha=alpha)


def subtract_from(op, out, b, a):
    """d(a - b), written b.__rsub__(a)."""
    return subtract(op, out, a, b)


def multiply(op, out, a, b):
    """d(a b) = da b + a db."""
    if T(b) is None:
        return T(a) * b
    if T(a) is None:
        return a * T(b)
    if a.dtype == b.dtype:
        return torch.addcmul(T(a) * b, a, T(b))
    return T(a) * b + a * T(b)


def divide(op, out, a, b, *, rounding_mode=None):
    """d(a / b) = (da - (a / b) db) / b; piecewise constant where the quotient is rounded."""
    if rounding_mode is not None:
        return None
    if T(b) is None:
        return T(a) / b
    return out * T(b) / -b if T(a) is None else torch.addcmul(T(a), out, T(b), value=-1) / b


def divide_into(op, out, b, a):
    """d(a / b), written b.__rtruediv__(a)."""
    return divide(op, out, a, b)


def reciprocal(op, out, x):
    return T(x) * out.square().neg_()


def add_product(op, out, x, a, b, *, value=1):
    """d(x + value a b)."""
    total = T(x)
    for left, right in ((T(a), b), (a, T(b))):
        if left is not None and right is not None:
            fused = total is not None and total.dtype == left.dtype == right.dtype
            total = torch.addcmul(total, left, right, value=value) if fused else add_up(total, value * (left * right))
    return total


def power(op, out, x, exponent):
    """d x^n = n x^(n-1) dx for a number n; a tensor of exponents is left to torch."""
    if isinstance(exponent, Tensor) or not isinstance(x, Tensor):
        return NotImplemented
    if exponent == 0:
        return torch.zeros_like(T(x))
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


def sine(op, out, x):
    return T(x) * x.cos()


def cosine(op, out, x):
    return T(x) * x.sin().neg_()


def error_function(op, out, x):
    return T(x) * x.square().neg_().exp_().mul_(2 / math.sqrt(math.pi))


def sigmoid(op, out, x):
    return aten.sigmoid_backward(T(x), out)


def tanh(op, out, x):
    return aten.tanh_backward(T(x), out)


def silu(op, out, x, inplace=False):
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
    """The tangent where x is inside; bounds that ride are left to torch."""
    if T(min) is not None or T(max) is not None:
        return NotImplemented
    inside = torch.ones_like(x, dtype=torch.bool)
    if min is not None:
        inside = inside & (x >= min)
    if max is not None:
        inside = inside & (x <= max)
    return T(x) * inside


def where(op, out, condition, a=None, b=None):
    """Chosen as the values are."""
    ta, tb = (0 if T(v) is None else T(v) for v in (a, b))
    return torch.where(condition, ta, tb)


def where_else(op, out, a, condition, b):
    """a.where(condition, b)."""
    return where(op, out, condition, a, b)


def masked_fill(op, out, x, mask, value):
    """Filled places take the tangent of the value."""
    if T(x) is None:
        return torch.where(mask, T(value), 0)
    return T(x).masked_fill(mask, 0) if T(value) is None else torch.where(mask, T(value), T(x))


def interpolate_between(op, out, a, b, weight):
    """d lerp(a, b, w) = lerp(da, db, w) + (b - a) dw."""
    steady = None
    if T(a) is not None or T(b) is not None:
        steady = torch.lerp(tangent_or_zero(a), tangent_or_zero(b), weight)
    return add_up(steady, None if T(weight) is None else (b - a) * T(weight))


FLAT = (
    "floor ceil round trunc sign floor_divide __floordiv__ zeros_like ones_like empty_like full_like rand_like randn_like randint_like "
    "new_zeros new_ones new_empty new_full new_tensor heaviside bernoulli "
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ equal allclose isclose isnan isinf isfinite isposinf isneginf argmax "
    "argmin argsort count_nonzero nonzero any all logical_and logical_or logical_not logical_xor __bool__ searchsorted bucketize signbit"
).split()

ELEMENTWISE = {
    **every(constant, *FLAT),
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
    torch.where: where,
    Tensor.where: where_else,
    **every(masked_fill, "masked_fill"),
    **every(interpolate_between, "lerp"),
}
