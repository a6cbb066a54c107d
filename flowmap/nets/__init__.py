"""Floor 1: everything with weights that we train."""

from flowmap.nets.dit import DiT
from flowmap.nets.mlp import MLP

NETS = {"dit": DiT, "mlp": MLP}
