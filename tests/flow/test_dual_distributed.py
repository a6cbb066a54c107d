"""The dual forward through DDP and FSDP2 on two gloo processes equals that of the full batch on one process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from flowmap.flow.derivative import value_and_rate
from flowmap.flow.tangent.compiled import Compiled

RANKS, ROWS, D = 2, 3, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.mlp = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, t):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + t[:, None, None].sin() * F.silu(self.mlp(self.norm(x)))


class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Block() for _ in range(2)), checkpointed

    def forward(self, x, t):
        for block in self.blocks:
            x = checkpoint(block, x, t, use_reentrant=False) if self.checkpointed else block(x, t)
        return x


def make(checkpointed=False):
    torch.manual_seed(0)
    return Net(checkpointed).double()


def batch():
    torch.manual_seed(1)
    x, v = torch.randn(2, RANKS * ROWS, 5, D, dtype=torch.float64).unbind(0)
    return x, torch.rand(RANKS * ROWS, dtype=torch.float64), v


def loss_of(net, x, t, v):
    """AYF-EMD's shape: the value is drawn to a target that its rate moves."""
    value, rate = value_and_rate(net, (x, t), (v, torch.ones_like(t)))
    return (value - (value - 0.3 * rate).detach() - 0.1 * v).square().mean(), rate


def run(rank, address, wrapping):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for checkpointed in (False, True):
        compare(rank, wrapping, checkpointed)  # its wrappers are gone before the group is
    dist.barrier()
    dist.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads may outlive the interpreter's teardown and abort: "terminate called without an active exception"


def compare(rank, wrapping, checkpointed):
    reference = make()
    loss, rates = loss_of(reference, *batch())
    loss.backward()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    net = make(checkpointed)
    ways = compiled(net, wrapping) if "compiled" in wrapping else []
    if "ddp" in wrapping:
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in net.blocks:
            fully_shard(block)
        wrapped = fully_shard(net)
    for _ in range(2):  # the second step has the first one's state behind it
        wrapped.zero_grad()
        loss, rate = loss_of(wrapped, *(a[mine] for a in batch()))
        loss.backward()
    torch.testing.assert_close(rate, rates[mine], rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for way in ways:
        # what enters the first block needs no gradient; checkpointing calls it with leaves again
        graphs = 1 if "ddp" in wrapping else 3 if checkpointed else 2
        assert (way.stopped, way.fallbacks, way.graphs) == (None, 0, graphs), vars(way)


def compiled(net, wrapping):
    """With DDP the whole network, with FSDP2 its blocks, between whose hooks the forward stays eager."""
    torch._dynamo.config.optimize_ddp = False
    if "ddp" in wrapping:
        net.forward = Compiled(net.forward, backend=aot_eager)
        return [net.forward.dual]
    first = None
    for block in net.blocks:
        block.forward = Compiled(block.forward, backend=aot_eager, part=True, like=first)
        first = block.forward
    return [first.dual]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    "wrapping",
    ["fsdp2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ddp", "ddp, compiled", "fsdp2, compiled"))],
)
def test_two_processes_have_the_gradients_of_the_full_batch(tmp_path, wrapping):
    mp.spawn(run, (f"file://{tmp_path}/rendezvous", wrapping), nprocs=RANKS)
