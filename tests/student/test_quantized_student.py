"""Students loaded with quantised weights: the same samples as with the dequantised weights, and what is refused."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch

from flowmap.export import TARGETS, export
from flowmap.nets import MLP, DiT
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import Base, LoRA, fingerprint
from flowmap.nets.quantized import FORMATS, SMALLEST, QuantizedLinear, dequantized, quantized_layers
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import load_student, save_student
from flowmap.student.student import Student
from tests.support.random_student import random_student

pytest.importorskip("bitsandbytes")
forms = pytest.mark.parametrize("form", FORMATS)
NUM = 5
CONFIG = StudentConfig(
    DiT(preset="nano", depth=2), Deterministic(), (3, 4, 6), num_classes=7, guidance=(1.0, 3.0, 1.5), recipe="r", step=9
)
OPTIONS = dict(steps=2, cond={"class": 2}, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a student with random weights."""
    return saved(tmp_path_factory.mktemp("student"), CONFIG)


def saved(folder, config):
    weights = random_student(config).flow_map.state_dict()
    save_student(folder, config, weights, recipe="name: r\n", card="# r\n")
    return folder


def dequantised(student: Student) -> Student:
    """The student with linear layers of the dequantised weights."""
    flow_map = copy.deepcopy(student.flow_map)
    for name, layer in list(flow_map.named_modules()):
        if isinstance(layer, QuantizedLinear):
            shape = (layer.out_features, layer.in_features)
            linear = torch.nn.Linear(*shape[::-1], bias=layer.bias is not None)
            linear.weight.data = dequantized(layer.codes, layer.scales, layer.form, shape, torch.float32)
            linear.bias = layer.bias
            flow_map.set_submodule(name, linear)
    return Student(student.config, flow_map.requires_grad_(False), student.folder)


@forms
def test_it_draws_what_the_dequantised_weights_draw_in_the_formats_memory(folder, form):
    whole, student = load_student(folder), load_student(folder, quantize=form)
    assert (whole.quantized, student.quantized) == (None, form)
    plain = dequantised(student)
    torch.testing.assert_close(student.sample(NUM, **OPTIONS), plain.sample(NUM, **OPTIONS), rtol=1e-4, atol=1e-4)
    error = (student.sample(NUM, **OPTIONS) - whole.sample(NUM, **OPTIONS)).abs().mean()
    assert 0 < error < {"int8": 0.05, "nf4": 0.5}[form]
    layers = quantized_layers(student.flow_map)
    count = sum(layer.in_features * layer.out_features for layer in layers)
    scales = {"int8": 4 * sum(layer.out_features for layer in layers), "nf4": 4 * count // 64}[form]
    rest = whole.weight_bytes - 4 * count
    assert student.weight_bytes == rest + {"int8": count, "nf4": count // 2}[form] + scales
    assert not [p for p in student.parameters() if p.requires_grad] and not student.flow_map.training
    wide = [layer for layer in student.flow_map.net.blocks.modules() if type(layer) is torch.nn.Linear]
    assert all(layer.weight.numel() < SMALLEST for layer in wide)


@forms
def test_it_is_compiled_in_one_graph_and_differentiable(folder, form, monkeypatch):
    graphs = []
    torch.compiler.reset()
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    student = load_student(folder, quantize=form)
    torch.testing.assert_close(student.sample(NUM, compile=True, **OPTIONS), student.sample(NUM, **OPTIONS))
    assert len(graphs) == 1
    x, t = torch.randn(NUM, 3, 4, 6, requires_grad=True), torch.ones(NUM)  # rewards move samples by this gradient
    (found,) = torch.autograd.grad(student(x, t, 0 * t).square().sum(), x)
    (wanted,) = torch.autograd.grad(dequantised(student)(x, t, 0 * t).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_of_a_lora_student_the_base_alone_is_quantised(tmp_path):
    source, student = lora_student(tmp_path)
    drawn = dict(cond={"text": torch.randn(NUM, 6, 32), "pooled": torch.randn(NUM, 24)})
    whole, half = load_student(source), load_student(source, quantize="int8")
    x, t = torch.randn(NUM, 4, 8, 8), torch.linspace(0.2, 0.9, NUM)
    call = lambda one: one.flow_map.mean_velocity(x, t, 0 * t, drawn["cond"])
    torch.testing.assert_close(call(half), call(dequantised(half)), rtol=1e-4, atol=1e-5)
    assert 0 < (call(half) - call(whole)).abs().max() < 0.05 * call(whole).abs().max()
    adapters = {name: p for name, p in half.flow_map.named_parameters() if ".lora_" in name}
    assert len(adapters) >= 4 and all(p.dtype == torch.float32 and not p.requires_grad for p in adapters.values())
    assert max(p.numel() for p in adapters.values()) >= SMALLEST
    assert set(half.flow_map.state_dict()) == set(whole.flow_map.state_dict())
    with pytest.raises(ValueError, match="^student: its weights are held as int8 codes.*load it without quantize"):
        half.merged()


def lora_student(root):
    """(the folder of a LoRA student, the student)."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tests.support.tiny_nets import sd3, with_random_weights

    torch.manual_seed(0)
    model, scheduler = with_random_weights(sd3()), diffusers.FlowMatchEulerDiscreteScheduler()
    model.save_pretrained(root / "base" / "transformer")
    scheduler.save_pretrained(root / "base" / "scheduler")
    parts = {"transformer": ["diffusers", type(model).__name__], "scheduler": ["diffusers", type(scheduler).__name__]}
    (root / "base" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **parts}))
    spec = DiffusersModel(
        type(model).__name__, json.dumps(dict(model.config)), type(scheduler).__name__, json.dumps({})
    )
    base = Base(str(root / "base"), None, fingerprint(model))
    lora = LoRA(rank=128, targets=("to_q", "net.0.proj"))
    config = StudentConfig(spec, Deterministic(), (4, 8, 8), lora=lora, base=base, samples=Pixels(clamp=False))
    from flowmap.nets.lora import load_base

    student = Student(config, config.build(load_base(base, spec)).eval())
    weights = {name: 0.05 * torch.randn(value.shape) for name, value in student.flow_map.state_dict().items()}
    save_student(root / "student", config, weights, recipe="", card="")
    return root / "student", student


def test_what_it_cannot_do_is_one_line(folder, tmp_path, monkeypatch):
    student = load_student(folder, quantize="nf4")
    for to in TARGETS:
        with pytest.raises(ValueError, match="^student: its weights are held as nf4 codes.*without quantize to export"):
            export(student, tmp_path / "out", to=to)
    with pytest.raises(ValueError, match="^student: its weights are held as nf4 codes"):
        student.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="^quantize: 'int4' is not one of int8, nf4$"):
        load_student(folder, quantize="int4")
    small = saved(tmp_path / "small", StudentConfig(MLP(width=16), Deterministic(), (2,), samples=Pixels(clamp=False)))
    with pytest.raises(ValueError, match="^quantize: the network has no linear layers of 4096 weights in its blocks"):
        load_student(small, quantize="int8")
    monkeypatch.setattr("flowmap.nets.quantized.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^quantize: needs bitsandbytes: pip install 'flowmap-distillation.quantize.'$"
    ):
        load_student(folder, quantize="int8")


def test_the_command_draws_from_it_and_prints_its_size(folder, tmp_path, command):
    arguments = ["sample", "--student", folder, "--steps", 1, "--num", NUM, "--out"]
    code, out, err = command(*arguments, tmp_path / "drawn", "--quantize", "int8")
    assert code == 0 and out.strip() == str(tmp_path / "drawn" / "steps-1.png")
    size = (folder / "model.safetensors").stat().st_size / 2**20
    held = load_student(folder, quantize="int8").weight_bytes / 2**20
    assert err.startswith("quantize: int8: ") and err.endswith(f"; {size:.2f} MiB on disk, unchanged\n")
    assert f"all weights {held:.2f} MiB instead of " in err


@pytest.mark.slow
@forms
def test_inductor_draws_the_same_to_rounding(folder, form):
    torch.compiler.reset()
    student = load_student(folder, quantize=form)
    compiled = student.sample(NUM, compile=True, **OPTIONS)
    torch.testing.assert_close(compiled, student.sample(NUM, **OPTIONS), rtol=1e-4, atol=1e-4)
