"""Every tangent rule, and operations without a rule, against central differences in float64.

Each sample is a call of its operation; all its floating-point tensors are dual, first together, then one at a time.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowmap.flow.tangent import attention
from flowmap.flow.tangent.dual import Context, DualTensor, dual_forward, dual_tensor, name_of
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import constant
from flowmap.flow.tangent.rules_constant import PROPERTIES, READ


def r(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def cplx(*shape):
    return torch.randn(*shape, dtype=torch.complex128)


def whole(high, *shape):
    return torch.randint(high, shape)


def resting(x):
    """x, without a tangent."""
    x.rests = True
    return x


def call(*args, **kwargs):
    return args, kwargs


def spread(*names_and_samples):
    """{name: samples} from ("name name", sample, sample, ...) rows."""
    return {name: samples for names, *samples in names_and_samples for name in names.split()}


CONV = {
    d: dict(
        zip(("x", "w", "wt", "b"), (r(2, 4, *[5, 6, 3][:d]), r(6, 2, *[2] * d), r(4, 3, *[2] * d), r(6)), strict=True)
    )
    for d in (1, 2, 3)
}
SAMPLES = spread(
    (
        "add sub subtract",
        lambda: call(r(5, 3), r(3)),
        lambda: call(r(5, 3), r(5, 3), alpha=0.7),
        lambda: call(r(3), 2.0),
    ),
    (
        "__add__ __radd__ __sub__ __rsub__ mul multiply __mul__ __rmul__",
        lambda: call(r(5, 3), r(3)),
        lambda: call(r(3), 2.0),
    ),
    (
        "div divide true_divide __truediv__ __div__",
        lambda: call(r(5, 3), positive(3)),
        lambda: call(r(3), 2.0),
        lambda: call(r(3), other=2.0),
    ),
    ("__rtruediv__ __rdiv__", lambda: call(positive(5, 3), r(3)), lambda: call(positive(3), 2.0)),
    ("addcmul", lambda: call(r(5, 3), r(3), r(5, 1), value=0.3)),
    (
        "pow __pow__",
        lambda: call(positive(3), 2),
        lambda: call(positive(3), 2.5),
        lambda: call(positive(3), 0),
        lambda: call(positive(3), r(3)),
    ),
    ("neg negative __neg__ positive __pos__ abs absolute __abs__ square exp expm1 sin cos erf", lambda: call(r(5, 3))),
    ("sigmoid expit tanh silu relu gelu leaky_relu elu softplus hardswish mish logsigmoid", lambda: call(r(5, 3))),
    ("gelu", lambda: call(r(5, 3)), lambda: call(r(5, 3), approximate="tanh")),
    ("leaky_relu", lambda: call(r(5, 3), 0.2)),
    ("elu", lambda: call(r(5, 3), 0.6)),
    ("softplus", lambda: call(r(5, 3), 2.0, 1.0)),
    ("logit", lambda: call(positive(5, 3) / 2), lambda: call(positive(5, 3) / 2, 0.3)),
    ("hypot", lambda: call(r(5, 3), r(3))),
    ("sqrt rsqrt log log1p reciprocal", lambda: call(positive(5, 3))),
    (
        "clamp clip",
        lambda: call(r(5, 3), -0.4, 0.6),
        lambda: call(r(5, 3), min=0.1),
        lambda: call(r(5, 3), max=positive(3)),
    ),
    ("clamp_min clamp_max", lambda: call(r(5, 3), 0.1), lambda: call(r(5, 3), r(3))),
    ("maximum minimum fmax fmin", lambda: call(r(5, 3), r(5, 3)), lambda: call(r(5, 3), r(3))),
    ("nan_to_num sgn", lambda: call(r(5, 3))),
    ("sgn", lambda: call(cplx(5, 3))),
    ("full_like", lambda: call(r(5, 3), 7.0)),
    ("new_tensor", lambda: call(r(5), [3.0])),
    ("new_full", lambda: call(r(5), (3,), 1.0)),
    ("heaviside", lambda: call(resting(torch.tensor([0.0, 1, -1]).double()), r(3)), lambda: call(r(5, 3), r(3))),
    ("where", lambda: call(whole(2, 5, 3) > 0, r(5, 3), r(3)), lambda: call(whole(2, 5, 3) > 0, r(5, 3), 0.0)),
    ("masked_fill", lambda: call(r(5, 3), whole(2, 3) > 0, 1.5), lambda: call(r(5, 3), whole(2, 5, 3) > 0, r(1)[0])),
    ("lerp", lambda: call(r(5, 3), r(5, 3), 0.3), lambda: call(r(5, 3), r(5, 3), r(5, 3))),
    ("view reshape", lambda: call(r(5, 4, 3), (5, 12)), lambda: call(r(5, 4, 3), (-1, 3))),
    ("view_as reshape_as", lambda: call(r(5, 12), r(5, 4, 3))),
    ("expand_as", lambda: call(r(5, 1), r(5, 3))),
    ("flatten", lambda: call(r(5, 4, 3), 1)),
    ("unflatten", lambda: call(r(5, 12), 1, (4, 3))),
    (
        "ravel contiguous clone adjoint fliplr flipud tril triu diagonal diag_embed __iter__ unbind",
        lambda: call(r(5, 3)),
    ),
    ("t trace", lambda: call(r(5, 3))),
    (
        "unsqueeze chunk unsafe_chunk tensor_split cumsum softmax log_softmax logsumexp max min",
        lambda: call(r(5, 3), 1),
    ),
    ("sum mean", lambda: call(r(5, 3)), lambda: call(r(5, 3), dim=(0, 1), keepdim=True)),
    (
        "max min",
        lambda: call(r(5, 3)),
        lambda: call(r(5, 3), 1),
        lambda: call(r(5, 3), dim=0, keepdim=True),
        lambda: call(r(5, 3), r(5, 3)),
    ),
    ("squeeze", lambda: call(r(5, 1, 3), 1)),
    ("permute", lambda: call(r(5, 4, 3), (2, 0, 1))),
    ("transpose swapaxes swapdims movedim moveaxis", lambda: call(r(5, 4, 3), 0, 2)),
    ("expand broadcast_to", lambda: call(r(5, 1), (5, 3))),
    ("repeat tile", lambda: call(r(5, 3), (2, 3))),
    ("repeat_interleave", lambda: call(r(5, 3), 2, 1)),
    ("roll", lambda: call(r(5, 3), 2, 1)),
    ("flip", lambda: call(r(5, 3), (1,))),
    ("rot90", lambda: call(r(5, 3))),
    ("split split_with_sizes", lambda: call(r(5, 3), (2, 3))),
    ("narrow", lambda: call(r(5, 3), 0, 1, 2)),
    ("select", lambda: call(r(5, 3), 0, 1)),
    (
        "__getitem__",
        lambda: call(r(5, 3), (slice(1, 4), None)),
        lambda: call(r(5, 3), whole(5, 7)),
        lambda: call(r(4), whole(2, 4) > 0),
    ),
    ("gather", lambda: call(r(5, 3), 0, whole(5, 4, 3))),
    ("take_along_dim", lambda: call(r(5, 3), whole(5, 4, 3), 0)),
    ("index_select", lambda: call(r(5, 3), 0, whole(5, 4))),
    ("masked_select", lambda: call(r(5, 3), torch.eye(5, 3) > 0)),
    ("to", lambda: call(r(5, 3), torch.complex128), lambda: call(r(5, 3), "cpu", torch.float64)),
    ("double cpu resolve_conj resolve_neg", lambda: call(r(5, 3))),
    ("type_as", lambda: call(r(5, 3), r(2))),
    ("view_as_real conj real imag .real .imag .H .mH", lambda: call(cplx(5, 3))),
    (".T .mT", lambda: call(r(5, 3))),
    ("view_as_complex", lambda: call(r(5, 3, 2))),
    ("requires_grad_", lambda: call(r(5, 3), False)),
    ("cat concat concatenate stack hstack vstack dstack", lambda: call([r(5, 3), r(5, 3)])),
    ("cat concat", lambda: call([r(5, 3), r(5, 2)], dim=1), lambda: call(tensors=(r(5, 3), r(5, 2)), dim=-1)),
    ("broadcast_tensors", lambda: call(r(5, 1), r(3))),
    (
        "pad",
        lambda: call(r(5, 3), (1, 2), value=1.5),
        lambda: call(r(2, 5, 3), (1, 2), "reflect"),
        lambda: call(r(2, 5), (1, 0), "constant", 2.0),
    ),
    (
        "scatter",
        lambda: call(r(5, 3), 0, torch.tensor([[4, 1, 2]]), r(1, 3)),
        lambda: call(r(5, 3), 0, whole(5, 2, 3), value=1.0),
    ),
    ("scatter_add", lambda: call(r(5, 3), 0, whole(5, 4, 3), r(4, 3))),
    ("pixel_shuffle channel_shuffle", lambda: call(r(2, 4, 3, 5), 2)),
    ("pixel_unshuffle", lambda: call(r(2, 3, 4, 6), 2)),
    (
        "interpolate upsample",
        lambda: call(r(2, 3, 4, 6), scale_factor=2),
        lambda: call(r(2, 3, 4, 6), size=(5, 3), mode="bilinear"),
    ),
    ("unfold", lambda: call(r(2, 3, 4, 6), 2, 1)),
    ("fold", lambda: call(r(2, 12, 15), (4, 6), 2)),
    ("avg_pool1d adaptive_avg_pool1d", lambda: call(r(2, 3, 6), 2)),
    ("avg_pool2d adaptive_avg_pool2d", lambda: call(r(2, 3, 4, 6), 2)),
    ("avg_pool3d adaptive_avg_pool3d", lambda: call(r(2, 3, 4, 6, 2), 2)),
    ("linear", lambda: call(r(5, 3), r(4, 3), r(4)), lambda: call(r(2, 5, 3), weight=r(4, 3))),
    *[
        (f"conv{d}d", lambda d=d: call(CONV[d]["x"], CONV[d]["w"], CONV[d]["b"], padding=1, groups=2))
        for d in (1, 2, 3)
    ],
    *[(f"conv_transpose{d}d", lambda d=d: call(CONV[d]["x"], CONV[d]["wt"], r(3), stride=2)) for d in (1, 2, 3)],
    ("einsum", lambda: call("bi,ij,bj->b", r(5, 3), r(3, 4), r(5, 4)), lambda: call("bi,bj->ij", [r(5, 3), r(5, 4)])),
    (
        "matmul __matmul__",
        lambda: call(r(2, 5, 3), r(3, 4)),
        lambda: call(r(5, 3), r(3)),
        lambda: call(r(5, 3), other=r(3, 4)),
    ),
    ("__rmatmul__", lambda: call(r(3, 4), r(5, 3))),
    ("mm", lambda: call(r(5, 3), r(3, 4))),
    ("bmm", lambda: call(r(2, 5, 3), r(2, 3, 4))),
    ("mv", lambda: call(r(5, 3), r(3))),
    ("dot inner outer vecdot", lambda: call(r(3), r(3))),
    ("addmm", lambda: call(r(5, 4), r(5, 3), r(3, 4), beta=0.5, alpha=2), lambda: call(r(4), r(5, 3), r(3, 4))),
    ("baddbmm", lambda: call(r(2, 5, 4), r(2, 5, 3), r(2, 3, 4), beta=0.5, alpha=2)),
    ("softmax log_softmax", lambda: call(r(5, 3), dim=0), lambda: call(r(5, 3), -1)),
    ("logsumexp", lambda: call(r(5, 3), 1), lambda: call(r(5, 3), (0, 1), keepdim=True)),
    (
        "vector_norm norm",
        lambda: call(r(5, 3)),
        lambda: call(r(5, 4, 3), 2, (0, 2), keepdim=True),
        lambda: call(cplx(5, 3), dim=1),
        lambda: call(r(5, 3), 1, 0),
    ),
    ("norm", lambda: call(r(5, 3), "fro"), lambda: call(r(5, 3), None, 1), lambda: call(r(5, 4, 3), "nuc", (1, 2))),
    (
        "normalize",
        lambda: call(r(5, 3)),
        lambda: call(r(5, 4, 3), dim=-1, eps=1.5),
        lambda: call(r(5, 3), 1.0),
        lambda: call(cplx(5, 3)),
    ),
    ("layer_norm", lambda: call(r(5, 4, 3), (3,)), lambda: call(r(5, 4, 3), [4, 3], r(4, 3), r(4, 3), 1e-3)),
    ("rms_norm", lambda: call(r(5, 4, 3), (3,)), lambda: call(r(5, 4, 3), [4, 3], r(4, 3), 1e-3)),
    (
        "group_norm",
        lambda: call(r(5, 4, 3, 2), 2),
        lambda: call(r(5, 4, 3, 2).transpose(2, 3), 2, r(4), r(4), eps=1e-3),
    ),
    (
        "batch_norm",
        lambda: call(r(5, 4, 3), resting(r(4)), resting(positive(4)), r(4), r(4)),
        lambda: call(r(5, 4, 3, 2), None, None, None, None, True),
    ),
    ("dropout", lambda: call(r(5, 3), 0.4), lambda: call(r(5, 3), training=False), lambda: call(r(5, 3), 0.0)),
    (
        "scaled_dot_product_attention",
        lambda: call(r(2, 2, 5, 4), r(2, 2, 7, 4), r(2, 2, 7, 3)),
        lambda: call(r(2, 2, 5, 4), r(2, 2, 5, 4), r(2, 2, 5, 3), is_causal=True, scale=0.3),
        lambda: call(query=r(2, 2, 5, 4), key=r(2, 2, 7, 4), value=r(2, 2, 7, 3), attn_mask=r(5, 7)),
        lambda: call(r(2, 2, 5, 4), r(2, 2, 7, 4), r(2, 2, 7, 3), attn_mask=torch.arange(35).view(5, 7) % 3 > 0),
        lambda: call(r(2, 4, 5, 4), r(2, 2, 7, 4), r(2, 2, 7, 3), attn_mask=r(2, 1, 1, 7), enable_gqa=True),
        lambda: call(r(5, 4), r(7, 4), r(7, 3)),
    ),
    (
        "multi_head_attention_forward",
        lambda: call(
            r(5, 2, 4),
            r(7, 2, 4),
            r(7, 2, 4),
            4,
            2,
            r(12, 4),
            r(12),
            None,
            None,
            False,
            0.0,
            r(4, 4),
            r(4),
            need_weights=False,
        ),
    ),
)
STEPPED = spread(
    (
        "floor ceil round trunc sign zeros_like ones_like isnan isinf isfinite isposinf isneginf argmax argmin",
        lambda: call(r(5, 3)),
    ),
    ("argsort signbit fix isreal argwhere matrix_rank long int short char byte bool", lambda: call(r(5, 3))),
    ("count_nonzero nonzero any all logical_not __bool__ is_nonzero _assert_async", lambda: call(r(1))),
    (
        "floor_divide __floordiv__ __rfloordiv__ allclose isclose isin logical_and logical_or logical_xor",
        lambda: call(r(5, 3), r(5, 3)),
    ),
    ("eq ne not_equal lt less le less_equal gt greater ge greater_equal equal", lambda: call(r(5, 3), r(5, 3))),
    ("__eq__ __ne__ __lt__ __le__ __gt__ __ge__", lambda: call(r(5, 3), r(5, 3))),
    ("poisson", lambda: call(positive(5, 3))),
    ("binomial", lambda: call(torch.ones(5, 3).double() * 4, positive(5, 3) / 2)),
    ("__contains__", lambda: call(r(5), 2.0)),
    ("histc", lambda: call(r(5), 3)),
    ("nonzero_static", lambda: call(r(5), size=2)),
    ("multinomial", lambda: call(positive(5, 3), 1)),
    ("one_hot", lambda: call(whole(3, 5), 3)),
    ("new_empty_strided", lambda: call(r(5), (3,), (1,))),
    ("empty_like rand_like randn_like bernoulli", lambda: call(positive(5, 3) / 2)),
    ("randint_like", lambda: call(r(5, 3), 7)),
    ("new_zeros new_ones new_empty", lambda: call(r(5), (3,))),
    ("searchsorted", lambda: call(torch.arange(3.0).double(), r(5))),
    ("bucketize", lambda: call(r(5), torch.arange(3.0).double())),
)
OTHERS = {  # in no row: torch's forward derivative of the one operation
    "matrix_norm": (torch.linalg.matrix_norm, lambda: call(r(5, 3), dim=(0, 1))),
    "kron": (torch.kron, lambda: call(r(2, 3), r(3, 2))),
    "std": (torch.std, lambda: call(r(5, 3), dim=1)),
    "var": (torch.var, lambda: call(r(5, 3), dim=1, correction=0)),
    "var_mean": (torch.var_mean, lambda: call(r(5, 3), dim=1)),
    "glu": (F.glu, lambda: call(r(5, 4))),
    "prod": (torch.prod, lambda: call(r(5, 3), 1)),
    "cumprod": (torch.cumprod, lambda: call(r(5, 3), 1)),
    "sort": (torch.sort, lambda: call(r(5, 3), 1)),
    "topk": (torch.topk, lambda: call(r(5, 3), 2)),
    "amax": (torch.amax, lambda: call(r(5, 3), 1)),
    "atan2": (torch.atan2, lambda: call(r(5, 3), r(5, 3))),
    "polar": (torch.polar, lambda: call(positive(5, 3), r(5, 3))),
    "index_add": (torch.index_add, lambda: call(r(5, 3), 0, torch.tensor([1, 4]), r(2, 3))),
    "index_put": (torch.index_put, lambda: call(r(5, 3), (torch.tensor([1, 4]),), r(2, 3))),
    "max_pool2d": (F.max_pool2d, lambda: call(r(2, 3, 4, 6), 2)),
    "embedding": (F.embedding, lambda: call(whole(5, 7), r(5, 3))),
    "mse_loss": (F.mse_loss, lambda: call(r(5, 3), r(5, 3))),
    "bilinear": (F.bilinear, lambda: call(r(5, 3), r(5, 4), r(2, 3, 4))),
    "instance_norm": (F.instance_norm, lambda: call(r(5, 4, 3))),
    "cosine_similarity": (F.cosine_similarity, lambda: call(r(5, 3), r(5, 3))),
    "tensordot": (torch.tensordot, lambda: call(r(5, 3), r(3, 4), 1)),
    "rpow": (torch.Tensor.__rpow__, lambda: call(r(5), 2.0)),
    "diff": (torch.diff, lambda: call(r(5), prepend=r(2))),
    "relu6": (F.relu6, lambda: call(3 * r(5, 3))),
    "dropout2d": (F.dropout2d, lambda: call(r(5, 3, 4, 2))),
    "alpha_dropout": (F.alpha_dropout, lambda: call(r(5, 3), 0.5, True)),
    "addcdiv": (torch.addcdiv, lambda: call(r(5, 3), r(5, 3), positive(3))),
    "logaddexp": (torch.logaddexp, lambda: call(r(5, 3), r(3))),
    "out_of_kwargs": (torch.mul, lambda: call(input=r(5, 3), other=r(3))),
}


def short(function):
    name = name_of(function)
    if name.startswith("."):
        return name
    return name.rsplit(".", 1)[-1].replace("special_", "").replace("linalg_", "").replace("log_sigmoid", "logsigmoid")


def floats(leaves):
    return [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, torch.Tensor) and not hasattr(x, "rests") and (x.is_floating_point() or x.is_complex())
    ]


def numbers(out):
    """Everything differentiable that a call gave, as one vector."""
    leaves = tree_flatten(list(out) if hasattr(out, "__next__") else out)[0]
    parts = [
        leaves[i].as_subclass(torch.Tensor) if type(leaves[i]) is not DualTensor else leaves[i] for i in floats(leaves)
    ]
    return (
        torch.cat([torch.view_as_real(x.resolve_conj()).flatten() if x.is_complex() else x.flatten() for x in parts])
        if parts
        else torch.zeros(1)
    )


def check(function, sample):
    """The dual tangent against (f(p + h v) - f(p - h v)) / 2h; with h = 1e-6 the difference is good to about 1e-9."""
    torch.manual_seed(0)
    leaves, structure = tree_flatten(sample())
    places = floats(leaves)
    draw = torch.get_rng_state()

    def of(*primals):
        torch.set_rng_state(draw)
        given = list(leaves)
        for i, p in zip(places, primals, strict=True):
            given[i] = p
        args, kwargs = tree_unflatten(given, structure)
        return numbers(function(*args, **kwargs))

    primals = [leaves[i] for i in places]
    whole = [torch.randn_like(p) for p in primals]
    alone = (
        [[v if i == j else None for j, v in enumerate(whole)] for i in range(len(primals))] if len(primals) > 1 else []
    )
    for tangents in [whole, *alone]:
        value, rate = dual_forward(of, primals, tangents)
        moved = [
            of(*[p if v is None else p + h * v for p, v in zip(primals, tangents, strict=True)]) for h in (1e-6, -1e-6)
        ]
        torch.testing.assert_close(value, of(*primals), rtol=0, atol=0)
        torch.testing.assert_close(rate, (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    check_some_rows(of, primals, whole)


def check_some_rows(of, primals, tangents):
    """Tangents of the first entries of a dimension, in each argument and in all, equal those padded with zeros."""
    for dim in range(max(p.ndim for p in primals)):
        long = [i for i, p in enumerate(primals) if p.ndim > dim and p.shape[dim] > 1]
        for chosen in ([[i] for i in long] + [long]) if len(long) > 1 else [long]:
            turned = lambda x, i: x.transpose(0, dim) if i in chosen else x  # noqa: B023
            function = lambda *given: of(*[turned(x, i) for i, x in enumerate(given)])  # noqa: B023
            given = [turned(p, i) for i, p in enumerate(primals)]
            some = [turned(v, i)[:1] if i in chosen else None for i, v in enumerate(tangents)]
            full = [
                None if v is None else torch.cat([v, torch.zeros_like(p[1:])]) for v, p in zip(some, given, strict=True)
            ]
            (value, rate), (expected, full_rate) = (
                dual_forward(function, given, some),
                dual_forward(function, given, full),
            )
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
            torch.testing.assert_close(rate, full_rate, rtol=1e-9, atol=1e-12)


ELSEWHERE = ("float", "half", "bfloat16", "cuda", ".grad")  # change precision or device: tested by themselves
ELSEWHERE += ("quantized_linear",)  # of nets/quantized.py, where that is imported: tests/nets/test_quantized.py


def rows(of_constant):
    named = [(f, rule, f"{name_of(f)}-{i}") for i, (f, rule) in enumerate(RULES.items())]
    return [
        pytest.param(f, id=name)
        for f, rule, name in named
        if (rule is constant) == of_constant and short(f) not in ELSEWHERE
    ]


@pytest.mark.parametrize("function", rows(of_constant=False))
def test_every_rule_is_the_derivative(function):
    name = short(function)
    samples = SAMPLES[name]  # a KeyError here: a new row needs a sample
    if function is torch.Tensor.where:
        samples = [lambda: call(r(5, 3), whole(2, 5, 3) > 0, r(3)), lambda: call(r(5, 3), whole(2, 5, 3) > 0, 0.0)]
    if function is torch.Tensor.unfold:
        samples = [lambda: call(r(5, 6), 1, 2, 3)]
    samples = [sample for sample in samples if takes(function, sample)]
    assert samples, f"no sample fits {name_of(function)}"
    for sample in samples:
        check(function, sample)


def takes(function, sample):
    """Whether plain tensors may be so given: torch.f, Tensor.f and F.f differ in that."""
    args, kwargs = sample()
    try:
        function(*args, **kwargs)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", OTHERS)
def test_operations_without_a_rule_take_torchs_derivative(name):
    function, sample = OTHERS[name]
    assert function not in RULES or name == "out_of_kwargs"
    check(function, sample)


def aboard(x):
    return dual_tensor(x, torch.ones_like(x), Context())


@pytest.mark.parametrize(
    "function",
    [p for p in rows(of_constant=True) if short(p.values[0]) not in PROPERTIES and name_of(p.values[0])[0] != "."],
)
def test_piecewise_constant_operations_carry_no_tangent(function):
    torch.manual_seed(0)
    if short(function) in ("detach", "result_type", "can_cast"):
        return
    for sample in STEPPED[short(function)]:
        args, kwargs = sample()
        boarded = [aboard(a) if isinstance(a, torch.Tensor) else a for a in args]
        out = function(*boarded, **kwargs)
        assert not any(isinstance(x, DualTensor) for x in tree_flatten(out)[0])


def test_properties_are_those_of_the_value():
    x = r(5, 3).requires_grad_() * 2
    y = aboard(x)
    given = {"is_same_size": (x,), "__format__": ("",), "is_set_to": (x,)}
    apart = ("result_type", "detach", "__hash__", "is_nonzero", "register_hook", "register_post_accumulate_grad_hook")
    for name in PROPERTIES:
        if name not in apart and hasattr(x, name):
            assert getattr(y, name)(*given.get(name, ())) == getattr(x, name)(*given.get(name, ())), name
    for name in READ:
        if name not in ("_backward_hooks", "grad") and hasattr(x, name):
            assert getattr(y, name) is getattr(x, name) or getattr(y, name) == getattr(x, name), name
    assert y.grad_fn is x.grad_fn and torch.result_type(y, 1) == torch.float64
    assert type(y.detach()) is torch.Tensor and not y.detach().requires_grad


def test_hooks_reach_the_value():
    leaf, seen = r(3).requires_grad_(), []
    y = aboard(leaf)
    y.register_post_accumulate_grad_hook(lambda p: seen.append("leaf"))
    z = aboard(leaf * 2)
    z.register_hook(lambda g: seen.append("hook"))
    z.retain_grad()
    (z * 3).value.sum().backward()
    assert seen == ["hook", "leaf"] and torch.equal(z.value.grad, torch.full_like(leaf, 3.0))
    assert {aboard(leaf): 1} and aboard(r(1)).is_nonzero()


def test_change_of_precision_takes_the_tangent_along():
    x = aboard(r(5, 3))
    for name, dtype in (("float", torch.float32), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
        y = getattr(x, name)()
        assert type(y) is DualTensor and y.tangent.dtype == dtype == y.value.dtype


def test_attention_by_blocks_is_attention(monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_NUMBERS", 0)
    for sample in SAMPLES["scaled_dot_product_attention"]:
        check(F.scaled_dot_product_attention, sample)


def test_a_query_that_sees_no_key_has_zero_tangent():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    q, k, v = r(2, 5, 4), r(2, 7, 4), r(2, 7, 3)
    _, rate = dual_forward(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        (q, k, v),
        (r(2, 5, 4), r(2, 7, 4), r(2, 7, 3)),
    )
    assert rate.isfinite().all() and (rate[:, 2] == 0).all() and (rate[:, 3] != 0).any()
