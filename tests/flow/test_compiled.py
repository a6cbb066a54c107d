"""The compiled dual forward: what torch.compile captures, walked with tangents, is the eager dual forward."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager, aot_eager_decomp_partition
from torch._inductor import compile_fx, config
from torch._inductor.codegen.cpp import CppScheduling

from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.flow.tangent import dual
from flowmap.flow.tangent import rows as tangent_rows
from flowmap.flow.tangent.compiled import Compiled, uncompiled
from flowmap.flow.tangent.inductor import inductor, inductor_with_cuda_graphs, mend_loop_split
from flowmap.nets import NETS, DiT
from flowmap.nets.diffusers_calls import CALLS
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet
from tests.support.every_net import SMALL, WIDE, WITHOUT_DERIVATIVE, Sized, ours, own
from tests.support.families import FAMILIES

B = 3
SLOW = ("UNet2DConditionModel", "UNet2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel", "ZImageTransformer2DModel",
        "Flux2Transformer2DModel", "HunyuanImageTransformer2DModel", "Lumina2Transformer2DModel",
        "AuraFlowTransformer2DModel", "SD3Transformer2DModel",
        "edm_adm", "edm_ddpmpp", "edm_ddpmpp, ncsnpp")  # fmt: skip
"""Capturing these takes longer, or another one has their blocks."""
WALKED = lambda graph, inputs: graph.forward
"""A backend that compiles nothing: the walk runs on ordinary tensors."""


def setting(name: str, batch: int = B):
    """A student, x, t, s, v and conditions, with a departure and an arrival at the data among the times."""
    student, draw = SMALL[name].student(), SMALL[name].draw(batch)
    t = torch.tensor([0.9, 0.5, 0.3, 0.8, 0.6])[:batch]
    s = t * torch.tensor([0.1, 0.6, 0.0, 0.2, 0.9])[:batch]
    return student, draw["x"], t, s, draw["velocity"], draw["cond"]


def results(student, derive) -> list[Tensor]:
    """Value, rate and the gradients of a loss with both."""
    student.zero_grad()
    torch.manual_seed(0)
    value, rate = derive()
    assert not rate.requires_grad
    ((value - rate) ** 2).mean().backward()
    gradients = [p.grad for p in student.parameters()]
    return [value.detach(), rate, *(g for g in gradients if g is not None)]


def compiled(student, backend=WALKED) -> Compiled:
    student.net.forward = Compiled(student.net.forward, backend=backend)
    return student.net.forward


def check_equal(student, derivations, backend=WALKED, tolerance: float = 0.0) -> Compiled:
    """Each derivation gives what it gave before the network was compiled; nothing falls back."""
    before = [results(student, derive) for derive in derivations]
    ways = compiled(student, backend)
    for derive, want in zip(derivations, before, strict=True):
        found = results(student, derive)
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b) or (a - b).norm() <= tolerance * b.norm()
    assert (ways.dual.stopped, ways.plain.stopped) == (None, None)
    assert ways.dual.fallbacks == ways.plain.fallbacks == 0
    assert ways.dual.graphs > 0
    return ways


def test_every_network_that_a_derivative_is_taken_of_is_here():
    kinds = {name.partition(",")[0] for name in SMALL} - {"lediflow"}
    assert kinds | set(WITHOUT_DERIVATIVE) == set(NETS) - {"diffusers"} | set(CALLS)
    assert list(WIDE) == list(SMALL)


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in SMALL])
def test_the_walk_is_the_dual_forward_and_pads_tangents_at_its_end_alone(name, monkeypatch):
    padded, whole = [], tangent_rows.whole
    monkeypatch.setattr(tangent_rows, "whole", lambda x: padded.append(x.value.shape) or whole(x))
    monkeypatch.setattr(dual, "whole", tangent_rows.whole)
    student, draw = SMALL[name].student(), SMALL[name].draw(B)
    check_equal(student, [lambda: eulerian_derivative(student, **draw, rows=2)])
    assert padded == [draw["x"].shape] * 2


@pytest.mark.parametrize(
    ("backend", "tolerance"), [(WALKED, 0.0), pytest.param(inductor, 1e-4, marks=pytest.mark.slow)]
)
def test_so_is_that_of_attention_to_masked_tokens(backend, tolerance):
    extra = (ExtraCondition("left", 9, "tokens", 4, "words"), ExtraCondition("right", 9, "tokens", 3, "words"))
    sized = Sized(ours(DiT(preset="nano", depth=1), extra_conditions=extra))
    student, draw = sized.student(), sized.draw(B)
    draw["cond"] |= {
        "left": torch.tensor([[-1, 1, 2, 3]] * B),
        "right": torch.tensor([[4, 5, -1], [-1] * 3, [6, 7, 8]]),
    }
    check_equal(student, [lambda: eulerian_derivative(student, **draw, rows=2)], backend, tolerance)


@pytest.mark.parametrize("name", ["dit", pytest.param("edm_adm", marks=pytest.mark.slow)])
def test_so_is_that_of_some_rows_and_of_the_arrival_time(name):
    """Row counts, all rows and other batches share a graph; the walk of bfloat16 has the eager one's roundings."""
    student, x, t, s, v, cond = setting(name, batch=5)
    few = {key: value[:4] for key, value in cond.items()}
    first = lambda n: lambda: eulerian_derivative(student, x, t, s, v, cond, rows=n)
    fewer = lambda n: lambda: eulerian_derivative(student, x[:4], t[:4], s[:4], v[:4], few, rows=n)
    arrival = lambda n: lambda: lagrangian_derivative(student, x, t, s, cond, rows=n)
    with torch.autocast("cpu", torch.bfloat16):
        ways = check_equal(student, [first(3), first(2), first(None), fewer(3), fewer(None), arrival(4), arrival(None)])
    assert ways.dual.graphs == 2


def test_checkpointed_blocks_are_walked():
    student, x, t, s, v, cond = setting("dit")
    student.checkpoint_activations(True)
    check_equal(
        student, [lambda rows=rows: eulerian_derivative(student, x, t, s, v, cond, rows=rows) for rows in (None, 2)]
    )


class Attending(torch.nn.Module):
    """Torch's own encoder layer, which is one captured function, and a function without a rule."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x, t, s, cond=None):
        h = self.layer(x.flatten(2).transpose(1, 2).repeat(1, 1, 4) * (1 + t + s).view(-1, 1, 1))
        return torch.sinc(h[..., :4]).transpose(1, 2).reshape(x.shape)


def test_functions_made_of_others_are_entered():
    torch.manual_seed(0)
    student = FlowMapNet(Attending())
    _, x, t, s, v, _ = setting("dit")
    check_equal(student, [lambda: eulerian_derivative(student, x, t, s, v)])


class Dropping(torch.nn.Module):
    """Dropout of a number in every place: value and tangent are both 2 x or both 0."""

    def forward(self, x, t, s, cond=None):
        return torch.nn.functional.dropout(x, 0.5, self.training)


def test_value_and_tangent_have_one_mask():
    student = FlowMapNet(Dropping())
    x, t = torch.ones(B, 1000), torch.full((B,), 0.5)
    ways = compiled(student)
    for rows in (None, 2):
        value, rate = eulerian_derivative(student, x, t, t, 3 * x, rows=rows)
        assert torch.equal(rate[:rows], 3 * value[:rows]) and 0.4 < (value == 0).float().mean() < 0.6
        assert rows is None or not rate[rows:].any()
    assert ways.dual.fallbacks == 0 and ways.dual.graphs == 2


class Mixing(torch.nn.Module):
    """The mean over the batch: a tangent of some samples reaches all."""

    def forward(self, x, t, s, cond=None):
        return x - x.mean(0)


def test_samples_may_mix_in_a_whole_network():
    student, x, t = FlowMapNet(Mixing()), torch.randn(B, 4), torch.full((B,), 0.5)
    derive = lambda: derived(lambda: eulerian_derivative(student, x, t, t, 3 * x, rows=2))
    assert derive()[1][2].any()
    check_equal(student, [derive])


class Rolling(torch.nn.Module):
    """A random permutation inside a function that has no rule: the derivative would see another one."""

    def forward(self, x, t, s, cond=None):
        return torch.nn.functional.rrelu(x, training=True)


class Deciding(torch.nn.Module):
    """Python that reads a number: nothing to capture."""

    def forward(self, x, t, s, cond=None):
        return x * 2 if float(s.sum()) > 0 else x


@pytest.mark.parametrize("part, net, rows", [(True, Mixing, 2), (False, Rolling, None), (False, Deciding, None)])
def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(part, net, rows):
    student, lines = FlowMapNet(net()), []
    x, t = torch.randn(B, 4), torch.full((B,), 0.5)
    derive = lambda: eulerian_derivative(student, x, t, t, 3 * x, rows=rows)
    want = results(student, lambda: derived(derive))
    ways = Compiled(student.net.forward, log=lines.append, backend=aot_eager, part=part)
    student.net.forward = ways
    found = [results(student, lambda: derived(derive)) for _ in range(2)]
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, want, strict=True))
    assert ways.dual.fallbacks == 2 and len(lines) == 1 and "runs uncompiled" in lines[0]


def derived(derive):
    value, rate = derive()
    return value.requires_grad_(), rate


def test_markers_are_refused_outside_a_capture():
    """Where torch.compile is switched off, the tangent is that of the eager dual forward."""
    student, x, t, s, v, cond = setting("dit")
    want = eulerian_derivative(student, x, t, s, v, cond)[1]
    ways = compiled(student)
    ways.dual.compiled = ways.dual.function
    assert torch.equal(eulerian_derivative(student, x, t, s, v, cond)[1], want)
    assert ways.dual.stopped == "NotCaptured: torch.compile is switched off"


def test_other_shapes_than_the_first_few_run_uncompiled(monkeypatch):
    monkeypatch.setattr("flowmap.flow.tangent.compiled.MOST_GRAPHS", 1)
    student, x, t, s, v, cond = setting("dit")
    of_departure = lambda: eulerian_derivative(student, x, t, s, v, cond)[1]
    of_arrival = lambda: lagrangian_derivative(student, x, t, s, cond)[1]
    want = {derive: derive() for derive in (of_departure, of_arrival)}
    ways = compiled(student)
    for derive in (of_departure, of_arrival) * 2:
        assert torch.equal(derive(), want[derive])
    assert (ways.dual.graphs, ways.dual.fallbacks) == (1, 2) and "more than 1" in ways.dual.stopped


def test_blocks_of_one_class_share_their_graphs():
    _, x, t, s, v, cond = setting("dit")
    student = FAMILIES["dit"].student()
    assert len(student.net.blocks) > 1
    want = results(student, lambda: eulerian_derivative(student, x, t, s, v, cond, rows=2))
    ways = None
    for block in student.net.blocks:
        block.forward = ways = Compiled(block.forward, backend=WALKED, like=ways, part=True)
    derive = lambda: eulerian_derivative(student, x, t, s, v, cond, rows=2)
    assert all(torch.equal(a, b) for a, b in zip(results(student, derive), want, strict=True))
    assert (ways.dual.graphs, ways.dual.fallbacks) == (1, 0)
    with uncompiled():
        derive()
    assert (ways.dual.graphs, ways.dual.fallbacks, ways.plain.graphs) == (1, 0, 0)


class Scaling(torch.nn.Module):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(7))

    def forward(self, x, t, s, cond=None):
        return self.weight * x.sin() * (t - s)[:, None]


def test_cuda_graphs_reach_inductor_in_forward_and_backward(monkeypatch):
    """Changing shapes have none, and the log says so."""
    seen, lines, original = [], [], compile_fx.compile_fx

    def inner(graph, inputs, **unused):
        seen.append((config.triton.cudagraphs, config.triton.cudagraph_skip_dynamic_graphs))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "compile_fx", partial(original, inner_compile=inner))
    student, x, t = FlowMapNet(Scaling()), torch.randn(5, 7), torch.linspace(0.1, 0.9, 5)
    ways = student.net.forward = Compiled(student.net.forward, log=lines.append, backend=inductor_with_cuda_graphs)
    for rows in (None, 2, 3):
        results(student, lambda rows=rows: eulerian_derivative(student, x, t, t / 2, x, rows=rows))
    assert (ways.dual.stopped, ways.dual.fallbacks) == (None, 0)
    assert seen == [(True, True)] * 2 * ways.dual.graphs and not config.triton.cudagraphs
    changing = [line for line in lines if "no CUDA graph" in line]
    assert len(changing) == 1 and f"graph {ways.dual.graphs} has shapes that change" in changing[0]


def test_torch_func_passes_by():
    student, x, t, s, v, cond = setting("dit")
    derive = lambda: eulerian_derivative(student, x, t, s, v, cond, mode="forward")
    want = derive()
    ways = compiled(student)
    assert torch.equal(derive()[1], want[1]) and ways.plain.stopped is None


@pytest.mark.slow  # about a minute each
@pytest.mark.parametrize("name", SMALL)
def test_compiled_by_inductor_it_is_the_dual_forward_to_rounding(name):
    student, draw = SMALL[name].student(), SMALL[name].draw(B)
    check_equal(student, [lambda: eulerian_derivative(student, **draw)], inductor, tolerance=1e-4)


@pytest.mark.slow
def test_so_is_a_norm_of_wide_groups():
    """Inductor splits the loops of such a kernel (tangent/inductor.py)."""
    wide = Sized(own(64))
    student, draw = wide.student(), wide.draw(B)
    check_equal(student, [lambda: eulerian_derivative(student, **draw)], inductor, tolerance=1e-4)


def test_the_split_of_loops_is_left_out_where_it_fails(monkeypatch):
    def fails(self, nodes):
        raise AssertionError("({y0: s12}, {y0: s21})")

    monkeypatch.setattr(CppScheduling, "try_loop_split", fails)
    mend_loop_split.__wrapped__()
    assert CppScheduling.try_loop_split(None, ["a kernel"]) == ["a kernel"]


WRONG_IN_BF16 = {
    "UNet2DConditionModel": "inductor's kernels, also by torch.compile alone; the operation is not known",
    "AuraFlowTransformer2DModel": "g++ 12.2 at -O3 miscompiles a kernel that transposes two tensors of bf16 (AVX-512)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=[pytest.mark.xfail(reason=WRONG_IN_BF16[one])] if one in WRONG_IN_BF16 else [])
        for one in SMALL
    ],
)
def test_so_it_is_under_autocast(name):
    check_rounding(name, inductor)


@pytest.mark.parametrize("name", [one if one == "mlp" else pytest.param(one, marks=pytest.mark.slow) for one in SMALL])
def test_under_autocast_partitioned_graphs_have_the_eager_errors(name):
    """Traced, decomposed and partitioned as for inductor, without its kernels: seconds in the place of a minute."""
    check_rounding(name, aot_eager_decomp_partition)


def check_rounding(name: str, backend) -> None:
    """bfloat16 has 8 bits: the errors against float64 are those of the eager dual forward."""
    student, draw = SMALL[name].student(), SMALL[name].draw(B)
    exact, wide = copy.deepcopy(student).double(), SMALL[name].draw(B, dtype=torch.float64)
    want = together(results(exact, lambda: eulerian_derivative(exact, **wide)))
    derive = lambda: together(results(student, lambda: eulerian_derivative(student, **draw)))
    with torch.autocast("cpu", torch.bfloat16):
        eager = derive()
        ways = compiled(student, backend)
        found = derive()
    assert (ways.dual.graphs, ways.dual.fallbacks) == (1, 0)
    for a, b, c in zip(found, eager, want, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


def together(found: list[Tensor]) -> list[Tensor]:
    """Value, rate and all gradients as one vector, in float64."""
    value, rate, *gradients = (one.double() for one in found)
    return [value, rate, torch.cat([one.flatten() for one in gradients])]
