"""Operations whose output is constant, whatever rides: the only ones that may give something without a tangent.

Their derivative is zero wherever it exists (floor, comparisons), or they take nothing of a tensor but its shape, dtype and device
(zeros_like, properties), or they say that a constant is meant (detach). What is not here and gives no tangent is refused by name.
"""

from __future__ import annotations

import torch

from flowmap.flow.tangent.rules_base import T, constant, every, getters

STEPS = (
    "floor ceil round trunc fix sign floor_divide __floordiv__ __rfloordiv__ bernoulli poisson binomial signbit "
    "eq ne not_equal lt less le less_equal gt greater ge greater_equal __eq__ __ne__ __lt__ __le__ __gt__ __ge__ equal allclose isclose isin "
    "isnan isinf isfinite isposinf isneginf isreal argmax argmin argsort argwhere count_nonzero nonzero nonzero_static any all "
    "logical_and logical_or logical_not logical_xor __bool__ __contains__ is_nonzero searchsorted bucketize histc multinomial "
    "one_hot long int short char byte bool"
).split()
"""Constant between jumps: counts, indices, comparisons, roundings, discrete draws."""
FRESH = (
    "zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty new_empty_strided detach"
).split()
"""New numbers in the shape of a tensor; its value without its tangent, asked for by name."""
PROPERTIES = (
    "dim size numel nelement stride is_contiguous is_floating_point is_complex element_size storage_offset get_device __len__ "
    "is_same_size is_inference is_pinned ndimension __hash__ __repr__ __format__ is_conj is_neg result_type "
    "register_hook register_post_accumulate_grad_hook retain_grad _is_view is_shared is_signed dim_order __dir__ "
    "is_set_to __dlpack_device__"
).split()
READ = (
    "shape dtype device ndim layout requires_grad grad_fn is_leaf is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_sparse_csr "
    "is_quantized is_mkldnn is_nested itemsize nbytes names output_nr retains_grad _version _base name _backward_hooks "
    "is_vulkan is_xla is_ipu is_maia is_mtia _post_accumulate_grad_hooks"
).split()


def no_gradient_yet(op, out, x):
    """x.grad, where there is one: numbers that depend on x, of which torch's backward pass keeps no tangent."""
    raise NotImplementedError(
        ".grad takes numbers out of the ride without their tangent: .detach() says that a constant is meant"
    )


def template(op, out, x, *args, **kwargs):
    """x.new_tensor(data): nothing of x but its dtype and device. Data that rides are left to torch, which refuses them."""
    T(x)


def unit(op, out, x):
    """sgn: a step for real numbers; of a complex one the direction, left to torch."""
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
