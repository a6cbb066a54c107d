"""Operations whose output has no tangent, whatever their arguments.

Their derivative is zero wherever it exists (floor, comparisons), or they use only the shape, dtype and device of a
tensor (zeros_like, properties), or they request a constant explicitly (detach). Any other operation without a tangent
raises.
"""

from __future__ import annotations

import torch

from flowmap.flow.tangent.refused import DETACHED
from flowmap.flow.tangent.rules_base import T, constant, every, getters

STEPS = (
    "floor ceil round trunc fix sign floor_divide __floordiv__ __rfloordiv__ bernoulli poisson binomial signbit "
    "eq ne not_equal lt less le less_equal gt greater ge greater_equal __eq__ __ne__ __lt__ __le__ __gt__ __ge__ "
    "equal allclose isclose isin isnan isinf isfinite isposinf isneginf isreal argmax argmin argsort argwhere "
    "count_nonzero nonzero nonzero_static any all logical_and logical_or logical_not logical_xor __bool__ "
    "__contains__ is_nonzero searchsorted bucketize histc multinomial one_hot long int short char byte bool"
).split()
"""Piecewise constant: counts, indices, comparisons, rounding, discrete random numbers."""
FRESH = (
    "zeros_like ones_like empty_like rand_like randn_like randint_like "
    "new_zeros new_ones new_empty new_empty_strided detach"
).split()
"""New tensors with the shape of another, and detach."""
PROPERTIES = (
    "dim size numel nelement stride is_contiguous is_floating_point is_complex element_size storage_offset get_device "
    "__len__ is_same_size is_inference is_pinned ndimension __hash__ __repr__ __format__ is_conj is_neg result_type "
    "register_hook register_post_accumulate_grad_hook retain_grad _is_view is_shared is_signed dim_order __dir__ "
    "is_set_to __dlpack_device__"
).split()
READ = (
    "shape dtype device ndim layout requires_grad grad_fn is_leaf is_cuda is_cpu is_mps is_xpu is_meta is_sparse "
    "is_sparse_csr is_quantized is_mkldnn is_nested itemsize nbytes names output_nr retains_grad _version _base name "
    "_backward_hooks is_vulkan is_xla is_ipu is_maia is_mtia _post_accumulate_grad_hooks"
).split()


def no_gradient_yet(op, out, x):
    """x.grad, if it is set: it depends on x, and torch's backward pass computes no tangent for it."""
    raise NotImplementedError(f".grad {DETACHED}")


def template(op, out, x, *args, **kwargs):
    """x.new_tensor(data) uses only the dtype and device of x. Dual tensors in data are left to torch, which raises."""
    T(x)


def unit(op, out, x):
    """sgn: piecewise constant for real numbers; for complex ones it is the direction, left to torch."""
    return NotImplemented if x.is_complex() else constant(op, out, x)


CONSTANT = {
    **every(unit, "sgn"),
    **every(template, "new_tensor"),
    **every(constant, *STEPS, *FRESH, *PROPERTIES),
    **getters(constant, *READ),
    **getters(no_gradient_yet, "grad"),
    torch._assert_async: constant,
    torch.linalg.matrix_rank: constant,
}
