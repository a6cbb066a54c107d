"""trainer.compile: which runs compile, that a compiled run is the run, and what the log says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.flow.path import Linear
from flowmap.flow.tangent.compiled import Compiled
from flowmap.flow.tangent.inductor import inductor_with_cuda_graphs
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD
from flowmap.recipe.settings import Trainer
from flowmap.train.compiling import BLOCK_CALLS, CPU_CALLS, GPU_CALLS, compile_networks, pays, report
from flowmap.train.csv_log import read_log


def recipe_of(tiny, *settings):
    return flowmap.read_recipe(tiny, list(settings))


@pytest.mark.parametrize(
    ("wanted", "steps", "device", "by_blocks", "compiles"),
    [("true", 1, "cpu", False, True), ("false", CPU_CALLS, "cuda", True, False),
     ("auto", CPU_CALLS - 1, "cpu", False, False), ("auto", CPU_CALLS, "cpu", False, True),
     ("auto", BLOCK_CALLS, "cpu", True, True), ("auto", BLOCK_CALLS - 1, "cpu", True, False),
     ("auto", GPU_CALLS, "cuda", False, True), ("auto", GPU_CALLS - 1, "cuda", True, False)],
)  # fmt: skip
def test_auto_compiles_what_trains_long_enough(tiny, wanted, steps, device, by_blocks, compiles):
    recipe = recipe_of(tiny, f"trainer.compile={wanted}", f"trainer.steps={steps}")
    assert pays(recipe, device, by_blocks=by_blocks) == compiles


def test_networks_of_unequal_blocks_wait_for_longer_runs(tiny):
    recipe = recipe_of(tiny, "trainer.compile=auto", f"trainer.steps={BLOCK_CALLS}")
    of_blocks, single = (FlowMapNet(DiT(preset="nano", depth=depth).build((1, 8, 8))) for depth in (2, 1))
    ways = compile_networks(recipe, "cpu", [of_blocks], [single], print)
    assert {way.name for way in ways} == {"student's Block", "student's Block, with derivative"}


def test_micro_batches_count_and_other_words_are_refused(tiny):
    long = recipe_of(tiny, "trainer.compile=auto", f"trainer.steps={CPU_CALLS // 2}", "trainer.accumulate=2")
    assert pays(long, "cpu", by_blocks=False)
    with pytest.raises(RecipeError, match="compile: 'always' is not one of true, false, auto, cuda_graphs"):
        recipe_of(tiny, "trainer.compile=always")


def test_a_compiled_run_is_the_run_and_the_log_says_what_was_compiled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.flow.tangent.compiled.inductor", lambda graph, inputs: graph.forward)
    losses = {}
    for wanted in ("false", "true"):
        lines: list[str] = []
        recipe = recipe_of(tiny, f"trainer.compile={wanted}", "trainer.steps=4")
        run = flowmap.fit(recipe, tmp_path / wanted, log=lines.append)
        losses[wanted] = [row["train/loss"] for row in read_log(run.folder / "log.csv")]
        said = [line for line in lines if line.startswith("compile: ")]
        assert bool(said) == (wanted == "true")
    assert losses["true"] == losses["false"]
    assert any("with derivative: graph 1 in" in line for line in said) and "0 calls ran uncompiled" in said[-1]


@pytest.mark.parametrize(
    ("precision", "device", "compiles"), [("bf16", "cpu", False), ("32", "cpu", True), ("bf16", "cuda", True)]
)
def test_bf16_on_a_cpu_whose_compiled_gradients_may_be_wrong_runs_uncompiled(tiny, precision, device, compiles):
    net, lines = FlowMapNet(DiT(preset="nano", depth=1).build((1, 8, 8))), []
    recipe = recipe_of(tiny, "trainer.compile=true", f"trainer.precision={precision}")
    ways = compile_networks(recipe, device, [net], [], lines.append)
    assert bool(ways) == compiles and any("bf16 runs uncompiled on a CPU" in line for line in lines) != compiles


def test_cuda_graphs_are_refused_on_a_cpu_in_any_precision(tiny):
    recipe = recipe_of(tiny, "trainer.compile=cuda_graphs", "trainer.precision=bf16", "trainer.accelerator=auto")
    with pytest.raises(RecipeError, match="cuda_graphs wants a CUDA device"):
        compile_networks(recipe, "cpu", [], [], print)


def test_sharded_networks_are_compiled_by_blocks_equal_ones_once(tiny):
    net = FlowMapNet(DiT(preset="nano", depth=3).build((1, 8, 8)))
    net.net.blocks[2].more = nn.Parameter(torch.ones(2))
    recipe = recipe_of(tiny, "trainer.compile=true")
    sharded = replace(recipe, trainer=replace(recipe.trainer, strategy="fsdp"))
    lines: list[str] = []
    ways = compile_networks(sharded, "cpu", [net], [], lines.append)
    forwards = [block.forward for block in net.net.blocks]
    assert all(isinstance(forward, Compiled) for forward in forwards) and not isinstance(net.net.forward, Compiled)
    assert forwards[0].dual is forwards[1].dual is not forwards[2].dual and len(ways) == 4
    report(ways, lines.append)
    assert lines == ["compile: 0 graphs in 0 s; 0 calls ran uncompiled"]


@pytest.mark.parametrize(
    ("wanted", "depth", "by_blocks"),
    [("trainer.compile=true", 3, True), ("trainer.compile=true", 1, False),
     ("trainer.activation_checkpointing=true", 3, False)],
)  # fmt: skip
def test_equal_blocks_are_compiled_once_for_all_frozen_networks(tiny, wanted, depth, by_blocks):
    student, strong = (FlowMapNet(DiT(preset="nano", depth=depth).build((1, 8, 8))) for _ in range(2))
    weak = FlowMapNet(strong.net.without_blocks((0,)))
    recipe = recipe_of(tiny, "trainer.compile=true", wanted)
    ways = compile_networks(recipe, "cpu", [student], [strong, weak], print)
    for net in (student, strong):
        assert all(isinstance(block.forward, Compiled) == by_blocks for block in net.net.blocks)
        assert isinstance(net.net.forward, Compiled) != by_blocks
    assert [way.name for way in ways[::2]] == (["student's Block", "teacher's Block"] if by_blocks else
                                               ["student", "teacher", "teacher"])  # fmt: skip
    assert not by_blocks or not isinstance(weak.net.blocks[0].forward.forward, Compiled)


@pytest.mark.parametrize("r_max", [1.0, 0.0])
def test_the_first_step_of_a_warm_up_is_not_compiled_for(r_max):
    """With r_max 0 every step is one without derivative."""
    student = FlowMapNet(DiT(preset="nano").build((1, 8, 8)))
    student.net.forward = ways = Compiled(student.net.forward, backend=lambda graph, inputs: graph.forward)
    sample = Linear().sample(torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2))
    AYFEMD(warmup_steps=10, r_max=r_max)(student, None, sample, 0)
    assert (ways.plain.graphs, ways.dual.graphs) == (int(r_max == 0), 0)


def test_the_check_of_a_teacher_is_not_compiled_for(tiny, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        "flowmap.flow.tangent.compiled.inductor",
        lambda graph, inputs: shapes.append(graph) or graph.forward,
    )
    lines: list[str] = []
    flowmap.fit(recipe_of(tiny, "trainer.compile=true", "trainer.steps=2"), tmp_path, log=lines.append)
    checked = next(i for i, line in enumerate(lines) if line.startswith("teacher: "))
    assert shapes and not any(line.startswith("compile: ") for line in lines[:checked])


def test_a_copy_of_a_compiled_network_is_a_network():
    net = FlowMapNet(DiT(preset="nano").build((1, 8, 8)))
    net.net.forward = Compiled(net.net.forward)
    other = copy.deepcopy(net)
    assert other.net.forward.__self__ is other.net and list(other.state_dict()) == list(net.state_dict())


def test_cuda_graphs_are_refused_where_memory_moves(tiny):
    wanted = "trainer.compile=cuda_graphs"
    for other, says in (("trainer.strategy=fsdp", "strategy fsdp"), ("trainer.accelerator=cpu", "accelerator is cpu")):
        with pytest.raises(RecipeError, match=f"compile: cuda_graphs .*{says}"):
            recipe_of(tiny, wanted, other)
    recipe, net = recipe_of(tiny, wanted, "trainer.accelerator=auto"), FlowMapNet(DiT(preset="nano").build((1, 8, 8)))
    with pytest.raises(RecipeError, match="wants a CUDA device, and this run is on cpu"):
        compile_networks(recipe, "cpu", [net], [], print)
    split = recipe_of(tiny, wanted, "trainer.accelerator=auto", "trainer.accumulate=2")
    with pytest.raises(RecipeError, match="one micro-batch a step, and this run has 2"):
        compile_networks(split, "cuda", [net], [], print)
    student, teacher = compile_networks(recipe, "cuda", [net], [], print)
    assert student.backend is teacher.backend is inductor_with_cuda_graphs


@pytest.mark.parametrize("wanted, marks", [("cuda_graphs", 4), ("true", 0)])
def test_each_step_starts_new_cuda_graphs(tiny, tmp_path, monkeypatch, wanted, marks):
    marked = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    monkeypatch.setattr("flowmap.train.stage.compile_networks", lambda *unused: [])
    monkeypatch.setattr(Trainer, "_check_cuda_graphs", lambda trainer: None)  # this run is on a CPU
    recipe = recipe_of(tiny, f"trainer.compile={wanted}", "trainer.steps=4", "metrics=[]")
    flowmap.fit(recipe, tmp_path / "run", log=lambda line: None)
    assert len(marked) == marks


class Fused(nn.Module):
    def forward(self, x):
        return torch.sin(x) * 2


def test_without_a_compiler_the_network_runs_as_it_is(tmp_path, monkeypatch):
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lines: list[str] = []
    net, x = Fused(), torch.randn(2, 3)
    net.forward = Compiled(net.forward, log=lines.append)
    assert torch.equal(net(x), torch.sin(x) * 2) and torch.equal(net(x), torch.sin(x) * 2)
    assert len(lines) == 1 and "compiler" in lines[0].lower()
