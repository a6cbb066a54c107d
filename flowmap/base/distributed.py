"""The rank of this process and the world size, before and after torch.distributed is set up.

torch is imported where it is needed: the command line asks for the rank, and `--help` does not wait for torch.
"""

import os
import sys
from typing import Any

BOTH = "cpu:gloo,cuda:nccl"  # the backends of a process group on GPUs: tensors of the CPU are reduced too
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_child() -> bool:
    """Whether Lightning, torchrun or SLURM started this process with a rank above 0; only rank 0 prints."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RANKS)


def on_gpus(accelerator: str) -> bool:
    """Whether a recipe with that trainer.accelerator uses GPUs of CUDA on this machine."""
    import torch

    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def ready() -> bool:
    """Whether a torch.distributed process group is initialized."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """The number of processes in the group; 1 without a group."""
    from torch import distributed

    return distributed.get_world_size() if ready() else 1


def any_process(found: bool) -> bool:
    """Whether it is true on any process of the group; all of them call it.

    They agree on the CPU where the group has a backend for it, so that no device is waited for.
    """
    if world_size() == 1:
        return found
    import torch
    from torch import distributed

    on_cpu = "cpu:" in distributed.distributed_c10d.get_backend_config()
    flag = torch.tensor(float(found), device="cpu" if on_cpu else "cuda")
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def rank() -> int:
    """The rank of this process in the group; 0 without a group."""
    from torch import distributed

    return distributed.get_rank() if ready() else 0


def gathered(value: Any) -> list[Any]:
    """The value of each process, in the order of ranks; values are small and can be pickled."""
    from torch import distributed

    found = [value] * world_size()
    if ready():
        distributed.all_gather_object(found, value)
    return found


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
