"""Training on PyTorch Lightning; the only room that imports it."""

from flowmap.base import torchvision_shim

torchvision_shim.install()  # libraries that this room imports import torchvision
