"""Which process this is, where a run is spread over several: before torch.distributed is set up, and within it."""

import os

from torch import distributed

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_child() -> bool:
    """A process that Lightning, torchrun or SLURM started beside the first one, which does the talking."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RANKS)


def ready() -> bool:
    """Whether this process belongs to a group of processes that can talk to each other."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """How many processes share the work; 1 outside a group."""
    return distributed.get_world_size() if ready() else 1


def rank() -> int:
    """Which of them this is, from 0; 0 outside a group."""
    return distributed.get_rank() if ready() else 0
