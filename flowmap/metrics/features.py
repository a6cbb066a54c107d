"""Feature spaces: features(x) is (B, D) for pictures x (B, C, H, W) in [-1, 1] or points x (B, D).

`build_features(name, reference)` makes one. Report a figure with the name of its space and the real-vs-real baseline in
it; only "inception" gives the FID of papers. Never measure with the network that a loss used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from flowmap.base.trust import allowed_attribute
from flowmap.metrics.picture_nets import CLIP, DINOv2, EfficientNetLite0, Inception, PictureNet
from flowmap.metrics.real import Device, Features, FrozenNetwork, Real, Rows, spread


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


FEATURES: dict[str, Callable[..., nn.Module]] = {  # made of the reference, or of the place of their weights
    "pixels": Pixels,
    "pca": PCA,
    "efficientnet_lite0": EfficientNetLite0,
    "inception": Inception,
    "clip": CLIP,
    "dinov2": DINOv2,
}


def build_features(name: str, reference: Rows, device: Device = "cpu", *, weights: str | None = None) -> Features:
    """The feature space of this name, fitted to the reference samples if it fits anything; frozen, in evaluation mode.

    It is on that device. A name with a colon, "package.mod:attr", is an attribute of a module that the user allows
    (base/trust.py): a module or function x -> (B, D), or a class that is made without arguments. weights: where those
    of a pretrained network are, if not in the default place. Raises ValueError for an unknown name, and for one with a
    missing package or missing weights.
    """
    check_features(name, weights)
    found = _network(name, weights) if is_fixed(name) else FEATURES[name](reference, device)
    return found.eval().requires_grad_(False).to(device)


def check_features(name: str, weights: str | None = None) -> None:
    """Raise ValueError, as build_features does, if the feature space is not available here; no network is loaded."""
    if ":" in name:
        allowed_attribute(name, "features")
    elif name not in FEATURES:
        raise ValueError(f"features is {name!r}; allowed are {', '.join(FEATURES)} or package.mod:attr")
    elif (net := _picture_net(name)) is not None:
        net.check(weights)


def check_weights(name: str, weights: str | None) -> None:
    """Raise ValueError if `weights` is given for a feature space that reads none."""
    net = _picture_net(name)
    if weights is not None and (net is None or not net.reads_weights):
        raise ValueError(f"weights: features {name!r} read none; allowed with inception, clip and dinov2")


def is_fixed(name: str) -> bool:
    """Whether the space is not fitted to the reference, so that statistics of other runs can be used in it."""
    return ":" in name or needs_pictures(name)


def width_of(name: str, weights: str | None = None) -> int | None:
    """The number of features, where it is known without loading a network."""
    net = _picture_net(name)
    return None if net is None else net.width(weights)


def needs_pictures(name: str) -> bool:
    """Whether the space is of pictures alone; nothing is known of an imported one."""
    return _picture_net(name) is not None


def _picture_net(name: str) -> type[PictureNet] | None:
    found = FEATURES.get(name)
    return found if isinstance(found, type) and issubclass(found, PictureNet) else None


def short_name(name: str) -> str:
    """The name in metrics.json: "pixels", and "clip" for "my.nets:clip"."""
    return name.rpartition(":")[2]


@lru_cache(maxsize=4)
def _network(name: str, weights: str | None) -> nn.Module:
    """A network that is not fitted to the reference, one for each process."""
    return FrozenNetwork(_imported(name) if ":" in name else FEATURES[name](weights))


def _imported(name: str) -> Features:
    found = allowed_attribute(name, "features")
    return found() if isinstance(found, type) else found
