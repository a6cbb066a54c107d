"""Three steps on 1, 2 and 4 gloo processes: the first gradients and the weights afterwards are those of one process.

The modules step in their own way (DDP around the training step, or the auxiliary networks' own averaging), in float64
and in float32; nothing but the order of sums differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

STEPS, GLOBAL = 3, 8
BALANCED = "discriminator: {kind: conv, width: 4}, balance: base, start: 0"
KINDS = {  # an objective, and what it needs
    "ayf_mixed": ("{kind: ayf_mixed, warmup_steps: 0, own_lagrangian: 0.5, own_eulerian: 0.5}",),
    "adversarial": (f"{{kind: adversarial, base: {{kind: meanflow}}, {BALANCED}}}",),
    "dmd": ("{kind: score_distillation, fake_steps: 2}", "sampler={kind: gamma, gamma: 1.0, steps: [1, 2]}"),
    "joint": ("{kind: joint, base: {kind: ayf_emd, warmup_steps: 0}, term: {kind: self_fake}}",),
    "rectified": ("{kind: rectified}",),
}


class _Step(nn.Module):
    """The training step as one forward, which DDP wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)


class _Optimizer:
    """An optimizer as Lightning wraps it. On the student's step, the global step goes on."""

    def __init__(self, optimizer, counter: list[int] | None, gradients: list):
        self.optimizer, self.counter, self.gradients = optimizer, counter, gradients
        self.param_groups = optimizer.param_groups

    def step(self):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.gradients:
            self.gradients += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        self.optimizer.step()
        if self.counter is not None:
            self.counter[0] += 1

    def zero_grad(self, set_to_none: bool = True):
        self.optimizer.zero_grad(set_to_none=set_to_none)


def _module(kind: str, folder: Path, micro_batch: int, accumulate: int):
    from tests.train.one_step import built
    from tests.train.test_split import KINDS as RECIPES
    from tests.train.test_split import recipe_of

    objective, *more = KINDS[kind]
    text, _, *changes = RECIPES[{"dmd": "score_distillation"}.get(kind, kind)]
    folder.mkdir(parents=True)
    recipe = recipe_of(folder, text, f"objective={objective}", *changes, *more)
    recipe = replace(
        recipe,
        data=replace(recipe.data, batch_size=micro_batch),
        trainer=replace(recipe.trainer, accumulate=accumulate),
        optimizer=replace(recipe.optimizer, eps=1e-3),  # Adam divides by the root of tiny second moments otherwise
    )
    return built(recipe)


def _three_steps(kind: str, dtype, folder: Path, rank: int, world: int, accumulate: int) -> dict[str, list]:
    from flowmap.data import StepBatches
    from flowmap.train.module import DistillModule
    from tests.train.one_step import as_double

    micro_batch, counter, gradients = GLOBAL // (world * accumulate), [0], []
    module = _module(kind, folder, micro_batch, accumulate).to(dtype)
    built = module.configure_optimizers()
    built = built if isinstance(built, list) else [built]
    wrapped = [_Optimizer(built[0], counter, gradients), *(_Optimizer(one, None, [0]) for one in built[1:])]
    DistillModule.global_step = property(lambda self: counter[0])
    DistillModule.global_rank = rank
    DistillModule.trainer = SimpleNamespace(world_size=world, optimizers=wrapped)
    DistillModule.optimizers = lambda self: wrapped
    step = _Step(module)
    if world > 1 and module.automatic_optimization:
        step = nn.parallel.DistributedDataParallel(step)
    split = dict(rank=rank, world=world, accumulate=accumulate)
    batches = StepBatches(len(module.samples), micro_batch, seed=module.recipe.seed, num_steps=STEPS, **split)
    for count, places in enumerate(batches, 1):
        batch = module.samples.__getitems__(places)
        loss = step(as_double(batch) if dtype == torch.float64 else batch)
        if loss is not None:
            (loss / accumulate).backward()
            if count % accumulate == 0:
                wrapped[0].step()
                wrapped[0].zero_grad()
    assert counter == [STEPS]
    return {"gradients": gradients, "weights": [p.detach().clone() for p in module.parameters()]}


def _process(rank: int, world: int, accumulate: int, folder: str) -> None:
    torch.set_num_threads(1)
    name = f"{world}-{accumulate}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{name}", rank=rank, world_size=world)
    found = {}
    for kind in KINDS:
        for dtype in (torch.float64, torch.float32):
            own = Path(folder, f"{kind}-{dtype}-{name}-{rank}")
            found[kind, dtype] = _three_steps(kind, dtype, own, rank, world, accumulate)
    if rank == 0:
        torch.save(found, Path(folder, f"{name}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_steps_on_any_number_of_processes(tmp_path):
    splits = [(1, 1), (2, 2), (4, 1)]
    for world, accumulate in splits:
        mp.spawn(_process, (world, accumulate, str(tmp_path)), nprocs=world)
    alone, *others = (torch.load(tmp_path / f"{world}-{accumulate}.pt") for world, accumulate in splits)
    for split, other in zip(splits[1:], others, strict=True):
        for (kind, dtype), wanted in alone.items():
            share = 1e-12 if dtype == torch.float64 else 1e-6
            for what, tensors in wanted.items():
                scale = max(float(one.abs().max()) for one in tensors)
                assert scale > 0 and len(tensors) == len(other[kind, dtype][what])
                worst = max(float((a - b).abs().max()) for a, b in zip(tensors, other[kind, dtype][what], strict=True))
                assert worst <= share * scale, (split, kind, dtype, what, worst / scale)
