"""The rank of this process and the world size, before and after torch.distributed is set up."""

import os
from typing import Any

from torch import distributed

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_child() -> bool:
    """Whether Lightning, torchrun or SLURM started this process with a rank above 0; only rank 0 prints."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RANKS)


def ready() -> bool:
    """Whether a torch.distributed process group is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """The number of processes in the group; 1 without a group."""
    return distributed.get_world_size() if ready() else 1


def rank() -> int:
    """The rank of this process in the group; 0 without a group."""
    return distributed.get_rank() if ready() else 0


def gathered(value: Any) -> list[Any]:
    """The value of each process, in the order of ranks; values are small and can be pickled."""
    found = [value] * world_size()
    if ready():
        distributed.all_gather_object(found, value)
    return found
