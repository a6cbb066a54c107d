"""Attention with its tangent, as a whole, by blocks and by the kernel, against math attention's derivative in float64.

The Triton kernel runs from its source, in torch (tests/support/triton_twin.py), and in Triton's own interpreter where
triton is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap.estimate.live import LiveBytes
from flowmap.flow.derivative import value_and_rate
from flowmap.flow.tangent import attention, attention_blocks
from flowmap.flow.tangent.attention import attention_and_tangent
from flowmap.flow.tangent.attention_blocks import Block
from flowmap.flow.tangent.attention_call import call_of
from flowmap.flow.tangent.dual import dual_forward
from tests.support.triton_twin import twin_of

KERNEL = Path(attention.__file__).with_name("attention_triton.py")
SOME_KEYS_UNSEEN = torch.arange(37 * 45).view(37, 45) % 3 > 0
BLIND = (
    SOME_KEYS_UNSEEN & (torch.arange(37) != 5)[:, None] & ((torch.arange(37) != 6)[:, None] | (torch.arange(45) > 40))
)
"""Query 5 sees no key, query 6 only the last few."""
ALL = ("query", "key", "value")


def case(q=(2, 3, 37, 20), k=(2, 3, 45, 20), v=(2, 3, 45, 12), *, moving=ALL, mask=None, tmask=False, **named):
    return {"shapes": (q, k, v), "moving": moving, "mask": mask, "tmask": tmask, "named": named}


CASES = {
    "all tangents": case(),
    "only query": case(moving=("query",)),
    "only key": case(moving=("key",)),
    "only value": case(moving=("value",)),
    "query and value": case(moving=("query", "value")),
    "query and key": case(moving=("query", "key")),
    "key and value": case(moving=("key", "value")),
    "scale": case(scale=0.7),
    "causal": case(is_causal=True),
    "causal, more queries": case((2, 3, 45, 20), (2, 3, 37, 20), (2, 3, 37, 12), is_causal=True),
    "boolean mask": case(mask=SOME_KEYS_UNSEEN),
    "boolean mask, unseen keys": case(mask=BLIND),
    "boolean mask of each sequence": case(mask=torch.arange(90).view(2, 1, 1, 45) % 7 > 2),
    "additive mask": case(mask=(37, 45)),
    "additive mask of each head": case(mask=(1, 3, 37, 1), tmask=True),
    "additive mask with a tangent": case(mask=(2, 3, 37, 45), tmask=True),
    "only the mask": case(mask=(2, 1, 37, 45), tmask=True, moving=()),
    "grouped heads": case((2, 6, 37, 20), (2, 2, 45, 20), (2, 2, 45, 12), enable_gqa=True),
    "grouped heads, mask": case((2, 6, 37, 20), (2, 2, 45, 20), (2, 2, 45, 12), enable_gqa=True, mask=(2, 6, 37, 45)),
    "one head of keys": case((2, 4, 37, 20), (2, 1, 45, 20), (2, 1, 45, 12), enable_gqa=True),
    "no heads": case((5, 37, 20), (5, 45, 20), (5, 45, 12)),
    "no batch": case((37, 20), (45, 20), (45, 12)),
    "five dimensions": case((2, 2, 3, 37, 20), (2, 2, 3, 45, 20), (2, 2, 3, 45, 12), mask=(2, 1, 1, 37, 45)),
    "batch of keys broadcast": case((2, 3, 37, 20), (1, 3, 45, 20), (1, 3, 45, 12)),
    "head of 32": case((1, 2, 37, 32), (1, 2, 45, 32), (1, 2, 45, 32)),
    "head of 64": case((1, 2, 37, 64), (1, 2, 45, 64), (1, 2, 45, 64)),
    "head of 72": case((1, 2, 37, 72), (1, 2, 45, 72), (1, 2, 45, 72)),
    "head of 128": case((1, 1, 37, 128), (1, 1, 45, 128), (1, 1, 45, 128)),
    "one query": case((2, 3, 1, 20)),
    "one key": case(k=(2, 3, 1, 20), v=(2, 3, 1, 12)),
}  # fmt: skip


def made(given: dict, dtype=torch.float64) -> tuple[dict, dict]:
    """The arguments and their tangents, in numbers that the type has."""
    make = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)
    # (..., tokens, heads, size) in memory, as networks give them
    swapped = lambda shape: draw((*shape[:-3], shape[-2], *shape[-3:-2], shape[-1])).transpose(
        -2, -3 if shape[2:] else -2
    )
    arrays = dict(zip(ALL, map(swapped, given["shapes"]), strict=True))
    tangents = {name: swapped(x.shape) for name, x in arrays.items() if name in given["moving"]}
    mask = given["mask"]
    if mask is not None:
        arrays["attn_mask"] = draw(mask) if isinstance(mask, tuple) else mask
        if given["tmask"]:
            tangents["attn_mask"] = draw(mask)
    return arrays, tangents


def reference(given: dict, arrays: dict, tangents: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and tangent by torch.func.jvp of math attention in float64."""
    wide = lambda x: x.double() if x.is_floating_point() else x
    arrays, tangents = ({key: wide(x) for key, x in one.items()} for one in (arrays, tangents))
    resting = {key: x for key, x in arrays.items() if key not in tangents}

    def of_moving(*values):
        moving = dict(zip(tangents, values, strict=True))
        return F.scaled_dot_product_attention(**resting, **moving, **given["named"])

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(of_moving, tuple(arrays[key] for key in tangents), tuple(tangents.values()))


def call(given: dict, arrays: dict, tangents: dict, dtype=torch.float64):
    """The call as the kernels take it, with torch's output."""
    out = reference(given, arrays, tangents)[0].to(dtype)
    named, t = given["named"], tangents.get
    scale = named.get("scale", arrays["query"].shape[-1] ** -0.5)
    qkv = [arrays[key] for key in ALL]
    more = [arrays.get("attn_mask"), t("attn_mask"), named.get("is_causal", False), scale]
    return call_of(*qkv, out, *(t(key) for key in ALL), *more, named.get("enable_gqa", False)), out


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found.double().reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("whole", [0, 1 << 30], ids=["by blocks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_the_tangent_is_that_of_math_attention(name, whole, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_NUMBERS", whole)
    monkeypatch.setattr(attention_blocks, "block_of", lambda call: Block(1, 2, 16, 7))
    arrays, tangents = made(CASES[name])
    out, wanted = reference(CASES[name], arrays, tangents)
    named = dict(CASES[name]["named"], attn_mask=arrays.get("attn_mask"), tmask=tangents.get("attn_mask"))
    found = attention_and_tangent(*(arrays[k] for k in ALL), *(tangents.get(k) for k in ALL), **named)
    assert error(found[0], out) < 1e-14 and error(found[1], wanted) < 1e-13
    assert found[1].shape == found[0].shape
    assert whole or found[1].stride() == torch.empty_like(found[0]).stride()


@pytest.fixture(params=["source", pytest.param("interpreter", marks=pytest.mark.slow)])
def kernel(request, monkeypatch):
    """The module of the Triton kernel: its source in torch, or in Triton's interpreter."""
    if request.param == "source":
        return twin_of(KERNEL)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return interpreted()


def interpreted():
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from flowmap.flow.tangent import attention_triton

    if type(attention_triton.kernel).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    make = interpreter.InterpreterBuilder.create_dot
    if make.__name__ != "of_bf16":
        interpreter.InterpreterBuilder.create_dot = products_of_bf16(interpreter, make)
    return attention_triton


def products_of_bf16(interpreter, make):
    """Triton's interpreter holds bf16 as integers, and multiplies these."""

    def of_bf16(self, a, b, *more):
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (self.create_fp_ext(x, interpreter.tl.float32) for x in (a, b))
        return make(self, a, b, *more)

    return of_bf16


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Of the tangent, relative to its largest number: a few roundings of the type."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_kernel_is_math_attention(kernel, dtype, name):
    arrays, tangents = made(CASES[name], dtype)
    problem, out = call(CASES[name], arrays, tangents, dtype)
    wanted = reference(CASES[name], arrays, tangents)[1]
    found = torch.full_like(problem.out, torch.nan)
    kernel.launch(problem, found, 16, 16, 4, 2)
    assert error(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64)])
def test_blocks_of_any_size(kernel, block_m, block_n):
    for name in ("all tangents", "causal, more queries", "boolean mask, unseen keys"):
        arrays, tangents = made(CASES[name], torch.float32)
        problem, _ = call(CASES[name], arrays, tangents, torch.float32)
        found = torch.full_like(problem.out, torch.nan)
        kernel.launch(problem, found, block_m, block_n, 4, 2)
        assert error(found, reference(CASES[name], arrays, tangents)[1]) < TOLERANCES[torch.float32]


BIG = case((1, 2, 300, 32), (1, 2, 700, 32), (1, 2, 700, 24))
"""More numbers than are computed as a whole, and than are in a block."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_in_each_precision(dtype):
    arrays, tangents = made(BIG, dtype)
    wanted = reference(BIG, arrays, tangents)[1]
    given = [one[k] for one in (arrays, tangents) for k in ALL]
    value, rate = dual_forward(F.scaled_dot_product_attention, given[:3], given[3:])
    assert value.dtype == rate.dtype == dtype and error(rate, wanted) < TOLERANCES[dtype]
    assert torch.equal(value, F.scaled_dot_product_attention(*given[:3]))


def test_on_a_cpu_half_precision_is_computed_in_float32():
    given = operator_arguments(BIG, torch.bfloat16)
    wide = [x.float() if isinstance(x, torch.Tensor) else x for x in given]
    assert torch.equal(attention.by_operator(*given), attention.by_operator(*wide).bfloat16())


def test_the_operator_is_central_differences():
    arrays, tangents = made(BIG)
    step, names = 1e-5, dict(zip(ALL, ALL, strict=True))
    moved = [{k: arrays[k] + sign * step * tangents[k] for k in names} for sign in (1, -1)]
    above, below = (F.scaled_dot_product_attention(**one) for one in moved)
    rate = attention_and_tangent(*arrays.values(), *tangents.values())[1]
    assert error(rate, (above - below) / (2 * step)) < 1e-8


def test_autocast_does_not_reach_into_the_operator():
    given = operator_arguments(BIG)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.by_operator(*given)
    assert torch.equal(found, attention.by_operator(*given))


@pytest.mark.parametrize("whole", [0, 1 << 30], ids=["by blocks", "whole"])
def test_under_autocast_the_tangent_is_that_of_the_rounded_arguments(whole, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_NUMBERS", whole)
    arrays, tangents = made(BIG, torch.float32)
    given = [one[k] for one in (arrays, tangents) for k in ALL]
    with torch.autocast("cpu", torch.bfloat16):
        value, rate = dual_forward(F.scaled_dot_product_attention, given[:3], given[3:])
    rounded = [x.bfloat16() for x in given]
    same = dual_forward(F.scaled_dot_product_attention, rounded[:3], rounded[3:])[1]
    assert value.dtype == torch.bfloat16 and torch.equal(rate, same)


def operator_arguments(given: dict, dtype=torch.float32) -> tuple:
    arrays, tangents = made(given, dtype)
    out = F.scaled_dot_product_attention(*(arrays[k] for k in ALL), attn_mask=arrays.get("attn_mask"))
    masks = arrays.get("attn_mask"), tangents.get("attn_mask")
    return *(arrays[k] for k in ALL), out, *(tangents.get(k) for k in ALL), *masks, False, 0.1, False


@pytest.mark.parametrize("name", ["all tangents", "only key", "additive mask with a tangent", "no batch", "head of 64"])
def test_the_operator_is_registered_right(name):
    """Schema, fake tensors with the same strides, and tracing by AOTAutograd."""
    given = operator_arguments(CASES[name])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.flowmap.attention_tangent.default, given, test_utils=tests)


def test_the_tangent_refuses_a_gradient():
    query, *more = operator_arguments(CASES["only key"])
    rate = torch.ops.flowmap.attention_tangent(query.requires_grad_(), *more)
    with pytest.raises(NotImplementedError, match="value_and_graded_rate"):
        rate.sum().backward()


def test_compile_and_export_see_one_operator():
    class Rate(torch.nn.Module):
        def forward(self, q, k, v, tq):
            with torch.no_grad():
                return attention_and_tangent(q, k, v, tq)[1]

    arrays, tangents = made(BIG, torch.float32)
    given = (*arrays.values(), tangents["query"])
    program = torch.export.export(Rate(), given, strict=False)
    graphs = [one.graph for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert names.count("flowmap.attention_tangent.default") == 1 and not any("bmm" in name for name in names)
    compiled = torch.compile(Rate(), backend="aot_eager", fullgraph=True)
    wanted = Rate()(*given)
    assert torch.equal(compiled(*given), wanted) and torch.equal(program.module()(*given), wanted)


def test_nothing_of_the_size_of_the_weights_is_in_memory():
    """The peak grows with the number of tokens, not with its square."""
    peaks = {}
    for n in (1024, 2048, 4096):
        q, k, v, o, tq, tk, tv = torch.randn(7, 1, 1, n, 16).unbind()
        with LiveBytes() as live, torch.no_grad():
            attention.by_operator(q, k, v, o, tq, tk, tv, None, None, False, 0.25, False)
        peaks[n] = live.peak
    assert peaks[4096] < 4 * 4096**2 / 8  # an eighth of the weights
    assert peaks[4096] - peaks[2048] == pytest.approx(2 * (peaks[2048] - peaks[1024]), rel=0.1)


def test_small_calls_are_computed_as_a_whole_on_a_cpu_alone():
    key = torch.empty(2, 4, 64, 8)
    assert attention.is_small(torch.empty(2, 4, 128, 8), key)
    assert not attention.is_small(torch.empty(2, 4, 4096, 8), torch.empty(2, 4, 4096, 8))
    assert not attention.is_small(key.to("meta"), key.to("meta"))


def test_blocks_follow_the_shape(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shape = lambda q, k: call_of(*operator_shapes(q, k), None, None, None, None, None, False, 1.0, False)
    assert attention_blocks.block_of(shape((3, 8, 1000, 4), 1000)) == Block(1, 2, 256, 512)
    assert attention_blocks.block_of(shape((3, 8, 64, 4), 64)) == Block(8, 8, 64, 64)
    assert attention_blocks.block_of(shape((3, 8, 1, 4), 77)).queries == 1


def operator_shapes(q: tuple[int, ...], keys: int):
    key = torch.empty(*q[:2], keys, 4)
    return torch.empty(q), key, key, torch.empty(q)


def test_without_any_tangent_it_is_zero():
    arrays, _ = made(CASES["all tangents"])
    assert not attention_and_tangent(*arrays.values())[1].any()


def test_a_network_has_the_same_rate_either_way(monkeypatch):
    net = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).double()
    x, t = torch.randn(2, 3, 19, 32, dtype=torch.float64).unbind()
    rates = []
    for whole in (0, 1 << 30):
        monkeypatch.setattr(attention, "WHOLE_NUMBERS", whole)
        rates.append(value_and_rate(net, (x,), (t,))[1])
    assert error(rates[0], rates[1]) < 1e-13
    assert error(rates[0], value_and_rate(net, (x,), (t,), mode="forward")[1]) < 1e-12


def on_cuda(dtype, size=64) -> tuple:
    q, k, v, o, tq = torch.empty(5, 1, 2, 300, size, dtype=dtype, device="cuda").unbind()
    return q, k, v, o, tq, None, None, None, None, False, 0.1, False


@pytest.mark.parametrize(
    "dtype, size, precision, taken",
    [
        (torch.bfloat16, 128, "highest", True),
        (torch.float16, 40, "highest", True),
        (torch.bfloat16, 160, "highest", False),
        (torch.float32, 64, "high", True),
        (torch.float32, 64, "highest", False),
        (torch.float64, 64, "high", False),
    ],
)
def test_the_operator_takes_the_kernel_on_cuda_where_it_is_made_for_the_call(
    dtype, size, precision, taken, monkeypatch
):
    """With fake tensors of a GPU."""
    kernel = twin_of(KERNEL)
    monkeypatch.setattr(kernel, "by_kernel", lambda call: "kernel")
    monkeypatch.setattr(attention, "by_blocks", lambda call: "blocks")
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setitem(sys.modules, "flowmap.flow.tangent.attention_triton", kernel)
    monkeypatch.setattr("flowmap.flow.tangent.attention_triton", kernel, raising=False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    with FakeTensorMode():
        given = on_cuda(dtype, size)
        assert attention.by_operator(*given) == ("kernel" if taken else "blocks")
        assert not attention.is_small(given[3], given[1])
        monkeypatch.setattr(attention, "HAS_TRITON", False)
        assert attention.by_operator(*given) == "blocks"
    assert not kernel.takes(call_of(*(torch.empty(x.shape, dtype=dtype) for x in given[:4]), *given[4:]))


def test_the_kernel_takes_arrays_in_any_layout():
    """The mask's tangent not as the mask is, and queries whose numbers are not adjacent."""
    arrays, tangents = made(CASES["additive mask with a tangent"], torch.float32)
    wanted = reference(CASES["additive mask with a tangent"], arrays, tangents)[1]
    tangents["attn_mask"] = tangents["attn_mask"].mT.contiguous().mT
    arrays["query"] = arrays["query"].mT.contiguous().mT
    problem, _ = call(CASES["additive mask with a tangent"], arrays, tangents, torch.float32)
    found = torch.full_like(problem.out, torch.nan)
    twin_of(KERNEL).launch(problem, found, 16, 16, 4, 2)
    assert error(found, wanted) < TOLERANCES[torch.float32]
