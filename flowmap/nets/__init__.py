"""Networks and their settings, one file per architecture."""

import logging

from flowmap.base import torchvision_shim
from flowmap.nets.autoencoder_kl import AutoencoderKL
from flowmap.nets.auxiliary import ConvPrior, TransformerPrior
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.discriminator import Conv
from flowmap.nets.discriminator_features import OnFeatures, OnTeacher
from flowmap.nets.dit import DiT
from flowmap.nets.edm import ADM, DDPMpp
from flowmap.nets.edm2 import EDM2
from flowmap.nets.mlp import MLP
from flowmap.nets.module import Module
from flowmap.nets.module_clock import MODULE_CLOCKS
from flowmap.nets.stacked import Stacked
from flowmap.nets.text_joint import TextJoint
from flowmap.nets.text_pair import TextPair
from flowmap.nets.text_vae import TextVAE

torchvision_shim.install()  # libraries that this room imports import torchvision
# diffusers imports bitsandbytes, which on some CPUs advises a package that fetches kernels from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

NETS = {
    "dit": DiT,
    "mlp": MLP,
    "edm2": EDM2,
    "edm_ddpmpp": DDPMpp,
    "edm_adm": ADM,
    "diffusers": DiffusersModel,
    "module": Module,
    "stacked": Stacked,
    "autoencoder_kl": AutoencoderKL,
    "text_vae": TextVAE,
    "text_pair": TextPair,
    "text_joint": TextJoint,
    "conv_prior": ConvPrior,
    "transformer_prior": TransformerPrior,
}
__all__ = ["DISCRIMINATORS", "MODULE_CLOCKS", "NETS"]
DISCRIMINATORS = {"conv": Conv, "teacher": OnTeacher, "features": OnFeatures}
