"""Quantised frozen layers: their error, and networks of them against the same networks with dequantised weights."""

from __future__ import annotations

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh

from flowmap.flow.derivative import value_and_rate
from flowmap.nets.diffusers_model import DiffusersNet, clock_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import LoRA, add_lora
from flowmap.nets.quantized import FORMATS, SMALLEST, QuantizedLinear, dequantized, quantize, quantized_layers
from flowmap.train.sharding import shard
from tests.support.fake_group import lone_group
from tests.support.tiny_nets import dit, sd3, with_random_weights

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
B = 5
forms = pytest.mark.parametrize("form", FORMATS)
FAMILIES = {"DiT": (dit, diffusers.DDIMScheduler), "SD3": (sd3, diffusers.FlowMatchEulerDiscreteScheduler)}
TARGETS = ("to_q", "net.0.proj", "net.2")  # the last two have SMALLEST weights


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


COND = {"text": numbers(B, 6, 32), "pooled": numbers(B, 24), "class": torch.arange(B)}
X, T, S = numbers(B, 4, 8, 8), torch.linspace(0.2, 0.9, B), torch.linspace(0.1, 0.8, B)


def networks(family, rank=32, trained=True):
    """(teacher, LoRA student) that share the base. trained: B of the adapters is not zero."""
    make, scheduler = FAMILIES[family]
    torch.manual_seed(0)
    net = DiffusersNet(with_random_weights(make()), *clock_of(scheduler()), arrival=False, guidance=False)
    teacher = FlowMapNet(net.eval().requires_grad_(False))
    student = net.with_branches(arrival=True, guidance=False)
    add_lora(student, LoRA(rank=rank, targets=TARGETS))
    for name, p in student.named_parameters():
        if trained and p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return teacher, FlowMapNet(student.eval())


def layer_of(out, width, form, bias=True):
    """(a layer, the same one quantised)."""
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias).requires_grad_(False)
    holder = nn.Module()
    holder.blocks = [nn.ModuleList([layer])]
    net = FlowMapNet(holder)
    quantize([net], form)
    return layer, holder.blocks[0][0]


def weight_of(layer, dtype=torch.float32):
    return dequantized(layer.codes, layer.scales, layer.form, (layer.out_features, layer.in_features), dtype)


def filled(net, quantised):
    """The network with the dequantised weights of the quantised one."""
    for name, layer in quantised.named_modules():
        if isinstance(layer, QuantizedLinear):
            net.get_submodule(name).weight.data = weight_of(layer)
    return net


@forms
@pytest.mark.parametrize("width", [192, 96, 97])  # rows of whole blocks, of none, and of an odd number
def test_the_error_is_that_of_the_format(form, width):
    layer, quantised = layer_of(64, width, form)
    weight = layer.weight
    error = (weight_of(quantised) - weight).abs()
    if form == "int8":  # half a step of each row's absmax / 127
        assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)).all()
    else:  # half the widest gap of the 16 values, -1 to -0.6962, times the absmax of 64 weights
        assert (error.view(-1, 64) <= weight.view(-1, 64).abs().amax(1, keepdim=True) * 0.1520).all()
        assert 0.05 < error.square().mean().sqrt() / weight.square().mean().sqrt() < 0.11
    assert error.mean() > 0
    held = quantised.codes.nbytes + quantised.scales.nbytes
    assert held == {"int8": weight.numel() + 4 * 64, "nf4": weight.numel() * (1 / 2 + 4 / 64)}[form]


@forms
def test_on_the_meta_device_a_layer_has_the_same_shapes(form):
    _, quantised = layer_of(48, 192, form)
    with torch.device("meta"):
        _, outline = layer_of(48, 192, form)
    for real, shaped in zip(quantised.parameters(), outline.parameters(), strict=True):
        assert shaped.is_meta and (real.shape, real.dtype) == (shaped.shape, shaped.dtype)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_is_the_linear_layer_of_its_weights(form, dtype):
    layer, quantised = layer_of(48, 192, form)
    x = numbers(B, 7, 192).to(dtype).requires_grad_()
    wanted = nn.functional.linear(x, weight_of(quantised, dtype), layer.bias.to(dtype))
    found = quantised(x)
    assert found.dtype == dtype and torch.equal(found, wanted)
    g = numbers(B, 7, 48).to(dtype)
    one, two = (torch.autograd.grad(y, x, g)[0] for y in (found, wanted))
    assert one.dtype == dtype and torch.allclose(one, two, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = quantised(x)
        # autocast leaves float64 as it is
        plain = found if dtype == torch.float64 else nn.functional.linear(x, weight_of(quantised), layer.bias)
    assert half.dtype == plain.dtype and torch.equal(half, plain)


@forms
@pytest.mark.parametrize("family", FAMILIES)
def test_value_derivative_and_gradients_are_those_of_the_dequantised_weights(family, form):
    _, student = networks(family)
    quantize([student], form)
    plain = filled(networks(family)[1], student)
    assert len(quantized_layers(student)) >= 6 and not quantized_layers(plain)
    found = []
    for net in (student, plain):
        velocity = lambda x, t, net=net: net.mean_velocity(x, t, S, COND)
        value, rate = value_and_rate(velocity, (X, T), (numbers(*X.shape), torch.ones(B)), mode="dual")
        reference = value_and_rate(velocity, (X, T), (numbers(*X.shape), torch.ones(B)), mode="forward")[1]
        assert torch.allclose(rate, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
        (value.square().mean() + (value * rate).mean()).backward()
        found.append((value.detach(), rate, {n: p.grad for n, p in net.named_parameters() if p.requires_grad}))
    (value, rate, grads), (value_of_plain, rate_of_plain, grads_of_plain) = found
    assert torch.allclose(value, value_of_plain, rtol=1e-5, atol=1e-5 * float(value_of_plain.abs().max()))
    assert torch.allclose(rate, rate_of_plain, rtol=1e-5, atol=1e-5 * float(rate_of_plain.abs().max()))
    assert grads.keys() == grads_of_plain.keys() and any(".lora_A." in name for name in grads)
    for name, grad in grads.items():
        scale = float(grads_of_plain[name].abs().max())
        assert torch.allclose(grad, grads_of_plain[name], rtol=1e-4, atol=1e-5 * scale), name


@forms
def test_no_dequantised_weight_is_kept_for_the_backward_pass(form):
    _, student = networks("DiT")
    quantize([student], form)
    shapes = {(layer.out_features, layer.in_features) for layer in quantized_layers(student)}
    shapes |= {shape[::-1] for shape in shapes}
    adapters = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        student.mean_velocity(X, T, S, COND)
    floating = [x for x in kept if x.is_floating_point() and x.data_ptr() not in adapters]
    assert floating and not [x.shape for x in floating if tuple(x.shape) in shapes]
    assert any(x.dtype in (torch.int8, torch.uint8) for x in kept)


@forms
def test_the_student_is_its_teacher_at_step_0_on_one_quantised_base(form):
    teacher, student = networks("DiT", trained=False)
    average = copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad})
    average.requires_grad_(False)  # its adapters are not trained, and yet are none of the base
    before = set(student.state_dict())
    quantize([teacher, student], form, copies=[average])
    assert torch.equal(teacher.velocity(X, T, COND), student.velocity(X, T, COND))
    assert torch.equal(average.velocity(X, T, COND), student.velocity(X, T, COND))
    theirs = {id(q.codes) for q in quantized_layers(teacher)}
    for net in (student, average):
        assert {id(q.codes) for q in quantized_layers(net)} == theirs
        assert set(net.state_dict()) == before, "adapters and branches alone, as before"
        net.load_state_dict(net.state_dict())
    kept = {name: p for name, p in student.named_parameters() if not p.requires_grad and p.is_floating_point()}
    assert any("timestep_embedder" in name for name in kept), "embeddings of times are not quantised"
    large = [name for name, p in kept.items() if p.ndim == 2 and p.numel() >= SMALLEST and "emb" not in name]
    assert not large


@forms
def test_a_sharded_network_in_bf16_does_not_round_its_scales(form):
    _, student = networks("DiT")
    quantize([student], form)
    with lone_group():
        _, sharded = networks("DiT")
        quantize([sharded], form)
        shard(sharded, init_device_mesh("cpu", (1,)), dtype=torch.bfloat16)
        for block, other in zip(student.net.blocks, sharded.net.blocks, strict=True):
            other.unshard()
            for one, two in zip(quantized_layers(block), quantized_layers(other), strict=True):
                assert torch.equal(weight_of(one), weight_of(two))


def test_a_network_without_large_layers_is_refused():
    with pytest.raises(ValueError, match="quantize.frozen: the network has no linear layers of 4096 weights"):
        layer_of(8, 8, "nf4")
