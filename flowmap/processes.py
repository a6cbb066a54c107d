"""Which process this is, where a run is spread over several."""

import os

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_child() -> bool:
    """A process that Lightning, torchrun or SLURM started beside the first one, which does the talking."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RANKS)
