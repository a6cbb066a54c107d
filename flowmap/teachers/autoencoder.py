"""Frozen diffusers autoencoders: encode images in [-1, 1] to normalised latents, and decode latents to images."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.finite import check_finite
from flowmap.base.hub import fetched
from flowmap.base.outside import bounded_text
from flowmap.base.ranges import Number, Positive, check_ranges

PARTS = ("config.json", "diffusion_pytorch_model*.safetensors*", "vae/*")
PATCHES = {"AutoencoderKLFlux2": 2}
"""By class, the side of the patches of latents whose numbers are the channels that a network reads.

The weights of these classes have the mean and variance of each channel, by which their pipeline normalises.
"""
LEVELS = ("block_out_channels", "encoder_block_out_channels")  # settings with a number for each level
FRAMES = ("AutoencoderKLQwenImage",)  # autoencoders of videos: a picture is one frame
VIDEOS = {"temperal_downsample", "temporal_compression_ratio"}  # settings of an autoencoder of videos


@dataclass(frozen=True)
class Autoencoder:
    """A diffusers autoencoder, from a folder or hub id (`source`, `revision`), or trained by a recipe (`recipe`).

    Latents are (z - shift) * scale, with one number or one per channel. By default these are the model's:
    shift_factor and scaling_factor, or latents_mean and scaling_factor / latents_std, or the running mean and standard
    deviation of the weights (FLUX.2, whose latents are patches of 2 x 2 with four times the channels). unit: the
    autoencoder works on images in [0, 1] instead of [-1, 1], as EDM2 used that of Stable Diffusion.
    """

    source: str | None = None
    recipe: str | None = None
    revision: str | None = None
    shift: tuple[Number, ...] | None = None
    scale: tuple[Positive, ...] | None = None
    unit: bool = False

    def __post_init__(self):
        check_ranges(self)
        if (self.source is None) == (self.recipe is None):
            kinds = "source (a folder or hub id) and recipe (one of ours that trains it)"
            raise ValueError(f"source: an autoencoder wants exactly one of {kinds}")

    def load(self) -> FrozenAutoencoder:
        """The autoencoder on the CPU, from safetensors only. Raises a one-line ValueError if it cannot be loaded."""
        import diffusers

        folder, config = self._place()
        try:
            cls = getattr(diffusers, config["_class_name"])
            model = cls.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True)
        except Exception as error:  # diffusers raises various types for invalid folders
            raise ValueError(f"autoencoder.source: {self.source!r}: cannot be loaded: {first_line(error)}") from error
        if type(model).__name__ not in FRAMES and any(isinstance(part, nn.Conv3d) for part in model.modules()):
            raise ValueError(self._of_videos(type(model).__name__))
        check_finite(model.state_dict(), f"autoencoder.source: {self.source!r}")
        return FrozenAutoencoder(model, *self._normalisation(folder, config), self.unit, self.identity())

    def identity(self) -> dict[str, Any]:
        """Plain values that identify its latents (class, weights, normalisation), without loading it."""
        folder, config = self._place()
        shift, scale = self._normalisation(folder, config)
        weights = {"class": config["_class_name"], "weights": digest_of(folder)}
        return weights | {"shift": list(shift), "scale": list(scale)} | ({"unit": True} if self.unit else {})

    def check_channels(self, channels: int) -> None:
        """Raise a ValueError if its config has another number of latent channels. It is not loaded."""
        _, config = self._place()
        if _channels_of(config) not in (None, channels):
            what = f"its latents have {_channels_of(config)} channels, those wanted {channels}"
            raise ValueError(f"autoencoder.source: {self.source!r}: {what}")

    def outline(self) -> tuple[int, int] | None:
        """(latent channels, downsampling factor) from its config; None if the config does not define them."""
        _, config = self._place()
        keys = ("dim_mult",) if config.get("_class_name") in FRAMES else LEVELS
        levels = next((config[key] for key in keys if config.get(key)), None)
        channels, patch = _channels_of(config), PATCHES.get(str(config.get("_class_name")), 1)
        if not isinstance(levels, list) or channels is None:
            return None
        return channels, patch * 2 ** (len(levels) - 1)

    def _place(self) -> tuple[Path, dict[str, Any]]:
        """Its local folder and the content of its config.json."""
        if self.source is None:
            how = "`flowmap fit` of a recipe that uses it does"
            raise ValueError(f"autoencoder.recipe: {self.recipe!r} is trained first: {how}")
        root = local_folder(self.source, self.revision, "autoencoder.source", PARTS)
        for folder in (root, root / "vae"):  # an autoencoder, or part of a pipeline
            if (folder / "config.json").is_file():
                config = _read(folder / "config.json")
                name = str(config.get("_class_name"))
                if not name.startswith("Autoencoder"):
                    continue
                if name not in FRAMES and VIDEOS & set(config):
                    raise ValueError(self._of_videos(name))
                return folder, config
        what = "is no diffusers autoencoder: no config.json there names an Autoencoder class"
        raise ValueError(f"autoencoder.source: {self.source!r} {what}")

    def _of_videos(self, name: str) -> str:
        what = f"{name} is an autoencoder of videos; of those {', '.join(FRAMES)} is known"
        return f"autoencoder.source: {self.source!r}: {what}"

    def _normalisation(self, folder: Path, config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        patched = str(config.get("_class_name")) in PATCHES and None in (self.shift, self.scale)
        own_shift, own_scale = _running(folder, config) if patched else _configured(config)
        shift = own_shift if self.shift is None else self.shift
        scale = own_scale if self.scale is None else self.scale
        for name, values in (("shift", shift), ("scale", scale)):
            if len(values) not in (1, _channels_of(config)):
                allowed = f"1 or {_channels_of(config)}, the channels"
                raise ValueError(f"autoencoder.{name}: {len(values)} numbers; allowed: {allowed}")
        return tuple(map(float, shift)), tuple(map(float, scale))


def _channels_of(config: Mapping[str, Any]) -> int | None:
    """The number of channels of its latents, by its config."""
    channels = config.get("z_dim" if config.get("_class_name") in FRAMES else "latent_channels")
    patch = PATCHES.get(str(config.get("_class_name")), 1)
    return channels * patch**2 if isinstance(channels, int) else None


def _configured(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of latents by the config."""
    std, factor = config.get("latents_std"), config.get("scaling_factor") or 1.0
    shift = config.get("latents_mean") or (config.get("shift_factor") or 0.0,)
    return shift, tuple(factor / value for value in std) if std else (factor,)


def _running(folder: Path, config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of latents by the running mean and variance in the weights, of which no other is read."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if "bn.running_mean" in file.keys():  # noqa: SIM118  # it is no mapping
                mean, variance = (file.get_tensor(f"bn.running_{name}").double() for name in ("mean", "var"))
                scale = (variance + config.get("batch_norm_eps", 1e-4)).rsqrt()
                return tuple(mean.tolist()), tuple(scale.tolist())
    raise ValueError(f"{folder}: no *.safetensors there holds the mean and variance of latents (bn.running_mean)")


class FrozenAutoencoder:
    """A loaded autoencoder: encode maps images (B, C, H, W) in [-1, 1] to latents (B, c, h, w), decode maps them back.

    Encoding is deterministic: it returns the posterior's mode.
    """

    model: Any  # a diffusers autoencoder

    def __init__(
        self, model: nn.Module, shift: tuple[float, ...], scale: tuple[float, ...], unit: bool, identity: dict[str, Any]
    ):
        self.model = model.eval().requires_grad_(False)
        self.shift, self.scale, self.unit, self._identity = shift, scale, unit, identity

    def identity(self) -> dict[str, Any]:
        return self._identity

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        z = latents_of(self.model, (x + 1) / 2 if self.unit else x)
        return (z.float() - self._channels(self.shift)) * self._channels(self.scale)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decode_with_grad(z)

    def decode_with_grad(self, z: Tensor) -> Tensor:
        """decode, with gradients for z."""
        z = z.to(self.device).float() / self._channels(self.scale) + self._channels(self.shift)
        x = pictures_of(self.model, z.to(self.dtype)).float()
        return 2 * x - 1 if self.unit else x

    def to(self, device) -> FrozenAutoencoder:
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _channels(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, -1, 1, 1)


def latents_of(model: Any, x: Tensor) -> Tensor:
    """The modes (B, c, h, w) of a diffusers autoencoder's latents for pictures x (B, C, H, W), before normalisation.

    They are as a network reads them: of FLUX.2's autoencoder (B, 4 c, h / 2, w / 2).
    """
    name = type(model).__name__
    if name in FRAMES:  # its own encode keeps the inputs of every layer for the next frame
        return model.quant_conv(model.encoder(x.unsqueeze(2))).chunk(2, 1)[0].squeeze(2)
    (z,) = model.encode(x).to_tuple()  # its name depends on the autoencoder
    z = z if isinstance(z, Tensor) else z.mode()
    return F.pixel_unshuffle(z, PATCHES[name]) if name in PATCHES else z


def pictures_of(model: Any, z: Tensor) -> Tensor:
    """The pictures (B, C, H, W) that a diffusers autoencoder decodes latents of latents_of to."""
    name = type(model).__name__
    if name in FRAMES:
        return model.decoder(model.post_quant_conv(z.unsqueeze(2))).squeeze(2).clamp(-1, 1)
    return model.decode(F.pixel_shuffle(z, PATCHES[name]) if name in PATCHES else z, return_dict=False)[0]


def local_folder(source: str, revision: str | None, key: str, parts: tuple[str, ...]) -> Path:
    """The local folder of that name, or the cached files `parts` of a hub id, which are downloaded if missing.

    ValueErrors name `key`.
    """
    if Path(source).is_dir():
        return Path(source)
    return fetched(source, parts, key=key, revision=revision)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(bounded_text(path, "json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def before_loading() -> None:
    """Prepare for loading weights with diffusers or transformers: no progress bars unless stderr is a terminal.

    This also enters a device context. torch collects the functions that a device context affects at its first use;
    transformers (5.23) replaces torch.linspace while it loads, and if that happened first, no device context of this
    process would affect the original function any more.
    """
    with torch.device("meta"):
        torch.zeros(())
    if not sys.stderr.isatty():
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def digest_of(folder: Path) -> str:
    """A hash of the safetensors files in the folder: 16 digits, from names, sizes, first and last megabytes."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"; {pickles[0]} is a pickle and is not read" if pickles else ""
        raise ValueError(f"{folder}: holds no *.safetensors{found}")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}{size}".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


AUTOENCODERS = {"diffusers": Autoencoder}


def stable_diffusion_autoencoder(channels: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, groups: int = 32):
    """A network of the architecture of Stable Diffusion's autoencoder, with random weights, for estimates of cost."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=layers, norm_num_groups=groups,
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip
