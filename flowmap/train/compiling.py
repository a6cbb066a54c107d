"""trainer.compile: which networks are compiled, when that pays, and what the log says of it.

A network of equal blocks is compiled block by block: they share their graphs, which are a block long, and so do
networks of equal blocks. What runs between them is little. Other networks are compiled whole, except with FSDP2, whose
hooks gather weights between the blocks. For CUDA graphs all networks are compiled whole, for batches of one size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import nn

from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.flow.tangent.compiled import Compiled, Way
from flowmap.flow.tangent.inductor import inductor_with_cuda_graphs
from flowmap.nets.blocks import blocks_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.recipe import Recipe

BLOCK_CALLS, CPU_CALLS, GPU_CALLS = 5_000, 50_000, 5_000
"""The number of micro-batches from which `auto` compiles: on a CPU networks of equal blocks and others, and on a GPU.

Compiling is paid once. docs/results/step_cost.md: digits, of equal blocks, takes 43 CPU seconds, which 2,600 steps pay
for. Whole networks take minutes there and save as little of a step. On a GPU nothing was measured.
"""


def pays(recipe: Recipe, device: str, *, by_blocks: bool) -> bool:
    """Whether a run of the recipe compiles a network: as it says, or with `auto` if it is long enough for its device.

    The answer depends on the recipe alone, so that a resumed run goes on as it began.
    """
    wanted = recipe.trainer.compile
    if wanted != "auto":
        return bool(wanted)
    calls = recipe.trainer.steps * recipe.batches.accumulate
    return calls >= (GPU_CALLS if device != "cpu" else BLOCK_CALLS if by_blocks else CPU_CALLS)


def compile_networks(
    recipe: Recipe, device: str, students: Iterable[FlowMapNet], frozen: Iterable[FlowMapNet], log: LogFunction
) -> list[Way]:
    """Compile the networks in place, where it pays; the ways of all of them, for `report`.

    Raises RecipeError if CUDA graphs are wanted and cannot be had.
    """
    if not pays(recipe, device, by_blocks=True):
        return []
    backend = _cuda_graphs(recipe, device) if recipe.trainer.compile == "cuda_graphs" else None
    if device == "cpu" and "bf16" in recipe.trainer.precision:  # docs/guide/numerics.md#compile
        log("trainer.compile: bf16 runs uncompiled on a CPU, where compiled gradients of some networks are wrong")
        return []
    kept = Path.home() / ".cache" / "flowmap" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = False  # it would split the graph of value and tangent
    trainer = recipe.trainer
    found: list[Way] = []
    for name, nets in (("student", students), ("teacher", frozen)):
        first: dict[tuple, Compiled] = {}
        for net in nets:
            blocks = [] if backend is not None else _outermost(blocks_of(net.net))
            alike = bool(blocks) and len({_kind(block) for block in blocks}) <= len(blocks) // 2
            if not pays(recipe, device, by_blocks=alike):
                continue
            if blocks and trainer.strategy == "fsdp" or alike and not trainer.activation_checkpointing:
                _compile_blocks(blocks, name, first, log)
            else:
                compiled = Compiled(net.net.forward, name=name, log=log, backend=backend)
                net.net.__dict__["forward"] = compiled
                found += compiled.ways
        found += (way for compiled in first.values() for way in compiled.ways)
    return found


def _cuda_graphs(recipe: Recipe, device: str) -> Callable:
    """The backend that records CUDA graphs, of whole networks."""
    if device != "cuda":
        raise RecipeError(f"trainer.compile: cuda_graphs wants a CUDA device, and this run is on {device}")
    if recipe.batches.accumulate > 1:  # gradients stay in the graph's memory, which its next replay overwrites
        what = f"goes with one micro-batch a step, and this run has {recipe.batches.accumulate}"
        raise RecipeError(f"trainer.compile: cuda_graphs {what}")
    return inductor_with_cuda_graphs


def _compile_blocks(blocks: Sequence[nn.Module], name: str, first: dict[tuple, Compiled], log: LogFunction) -> None:
    """Compile blocks in place; `first` has the first of every kind, whose graphs the others use."""
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), Compiled):  # of a network with the same blocks
            continue
        called, kind = f"{name}'s {type(block).__name__}", _kind(block)
        compiled = Compiled(block.forward, name=called, log=log, like=first.get(kind), part=True)
        first.setdefault(kind, compiled)
        block.__dict__["forward"] = compiled


def _kind(block: nn.Module) -> tuple:
    """Equal for blocks that can share graphs."""
    return (type(block), *(p.shape for p in block.parameters()))


def _outermost(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that are in no other one; each once."""
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in dict.fromkeys(blocks) if id(block) not in inside]


def report(ways: Sequence[Way], log: LogFunction) -> None:
    """One line on what was compiled in the run."""
    if ways:
        graphs, eager = sum(way.graphs for way in ways), sum(way.fallbacks for way in ways)
        seconds = sum(way.seconds for way in ways)
        log(f"compile: {graphs} graphs in {seconds:.0f} s; {eager} calls ran uncompiled")
