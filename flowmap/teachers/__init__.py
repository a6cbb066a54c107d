"""Frozen teachers: cards, exact teachers, guidance, and networks that were trained."""

from flowmap.base import torchvision_shim

torchvision_shim.install()  # libraries that this room imports import torchvision
