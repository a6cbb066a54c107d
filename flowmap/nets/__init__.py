"""Floor 1: everything with weights that we train."""

from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.dit import DiT
from flowmap.nets.edm2 import EDM2
from flowmap.nets.mlp import MLP

NETS = {"dit": DiT, "mlp": MLP, "edm2": EDM2, "diffusers": DiffusersModel}
