"""Frozen autoencoders: pictures in [-1, 1] become normalised latents, and latents pictures again. Any of diffusers' AutoencoderKL and kin."""

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

from flowmap.base.finite import check_finite
from flowmap.base.outside import bounded_text
from flowmap.base.ranges import Number, Positive, check_ranges

PARTS = ("config.json", "diffusion_pytorch_model*.safetensors*", "vae/*")


@dataclass(frozen=True)
class Autoencoder:
    """A diffusers autoencoder, from a folder or hub id (`source`, `revision`), or trained by one of our recipes (`recipe`).

    Latents are (z - shift) * scale, one number or one for each channel; left out, they are the model's own: shift_factor and
    scaling_factor, or latents_mean and scaling_factor / latents_std. unit: it is given pictures on [0, 1], not [-1, 1], as EDM2 used
    Stable Diffusion's.
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
            raise ValueError(
                "source: an autoencoder wants exactly one of source (a folder or hub id) and recipe (one of ours that trains it)"
            )

    def load(self) -> FrozenAutoencoder:
        """The autoencoder on the CPU, weights from safetensors alone. ValueError, in one line, where it cannot be had."""
        import diffusers

        folder, config = self._place()
        try:
            cls = getattr(diffusers, config["_class_name"])
            model = cls.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True)
        except Exception as error:  # a foreign folder makes the library raise anything at all
            raise ValueError(f"autoencoder.source: {self.source!r}: cannot be loaded: {first_line(error)}") from error
        check_finite(model.state_dict(), f"autoencoder.source: {self.source!r}")
        return FrozenAutoencoder(model, *self._normalisation(config), self.unit, self.identity())

    def identity(self) -> dict[str, Any]:
        """What makes its latents unlike those of another: class, weights, normalisation; plain values, found without loading it."""
        folder, config = self._place()
        shift, scale = self._normalisation(config)
        identity_ = {
            "class": config["_class_name"],
            "weights": digest_of(folder),
            "shift": list(shift),
            "scale": list(scale),
        }
        return identity_ | ({"unit": True} if self.unit else {})

    def check_channels(self, channels: int) -> None:
        """ValueError where its latents are known to have another number of channels; found without loading it."""
        _, config = self._place()
        if config.get("latent_channels") not in (None, channels):
            made = config["latent_channels"]
            raise ValueError(
                f"autoencoder.source: {self.source!r}: its latents have {made} channels, those wanted {channels}"
            )

    def outline(self) -> tuple[int, int] | None:
        """(channels of its latents, pixels a side that one of them covers), found without loading it; None where its config does not say."""
        _, config = self._place()
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        channels = config.get("latent_channels")
        return (channels, 2 ** (len(levels) - 1)) if isinstance(levels, list) and isinstance(channels, int) else None

    def _place(self) -> tuple[Path, dict[str, Any]]:
        """Its folder on this machine, and what its config.json says."""
        if self.source is None:
            raise ValueError(
                f"autoencoder.recipe: {self.recipe!r} is trained first: `flowmap fit` of a recipe that uses it does"
            )
        root = local_folder(self.source, self.revision, "autoencoder.source", PARTS)
        for folder in (root, root / "vae"):  # itself, or a part of a pipeline
            if (folder / "config.json").is_file():
                config = _read(folder / "config.json")
                if str(config.get("_class_name")).startswith("Autoencoder"):
                    return folder, config
        raise ValueError(
            f"autoencoder.source: {self.source!r} is no diffusers autoencoder: no config.json there names an Autoencoder class"
        )

    def _normalisation(self, config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        shift, scale = self.shift, self.scale
        if shift is None:
            shift = config.get("latents_mean") or (config.get("shift_factor") or 0.0,)
        if scale is None:
            std, factor = config.get("latents_std"), config.get("scaling_factor") or 1.0
            scale = tuple(factor / value for value in std) if std else (factor,)
        for name, values in (("shift", shift), ("scale", scale)):
            if len(values) not in (1, config.get("latent_channels")):
                raise ValueError(
                    f"autoencoder.{name}: {len(values)} numbers; allowed: 1 or {config.get('latent_channels')}, the channels"
                )
        return tuple(map(float, shift)), tuple(map(float, scale))


class FrozenAutoencoder:
    """encode: pictures (B, C, H, W) in [-1, 1] -> latents (B, c, h, w); decode: back. Deterministic: the posterior's mean."""

    model: Any  # an autoencoder of diffusers

    def __init__(
        self, model: nn.Module, shift: tuple[float, ...], scale: tuple[float, ...], unit: bool, identity: dict[str, Any]
    ):
        self.model, self.shift, self.scale, self.unit, self._identity = (
            model.eval().requires_grad_(False),
            shift,
            scale,
            unit,
            identity,
        )

    def identity(self) -> dict[str, Any]:
        return self._identity

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        out = self.model.encode((x + 1) / 2 if self.unit else x)
        z = (
            out.latent_dist.mode()
            if hasattr(out, "latent_dist")
            else out.latent
            if hasattr(out, "latent")
            else out.latents
        )
        return (z.float() - self._channels(self.shift)) * self._channels(self.scale)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decode_with_grad(z)

    def decode_with_grad(self, z: Tensor) -> Tensor:
        """The same pictures, carrying grad to z."""
        z = z.to(self.device).float() / self._channels(self.scale) + self._channels(self.shift)
        x = self.model.decode(z.to(self.dtype)).sample.float()
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


def local_folder(source: str, revision: str | None, key: str, parts: tuple[str, ...]) -> Path:
    """The folder of that name, or of that hub id and revision: of it `parts` are fetched where they are not in the cache. ValueError names `key`."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(parts)))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"{key}: {source!r} is no folder, and as a hub id{at}: {str(error).splitlines()[0]}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(bounded_text(path, "json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def first_line(error: Exception) -> str:
    """What an exception of another library says, its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def before_loading() -> None:
    """What must come before the libraries load weights: their progress bars are for a terminal alone, and torch must know its devices.

    torch remembers at their first use which functions a device context moves; transformers (5.23) exchanges torch.linspace while it loads, and
    if that came first, no context of this process would move the true one any more.
    """
    with torch.device("meta"):
        torch.zeros(())
    if not sys.stderr.isatty():
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def digest_of(folder: Path) -> str:
    """Sixteen hexadecimal digits of the safetensors files below: their names, sizes, first and last megabytes."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise ValueError(
            f"{folder}: holds no *.safetensors" + (f"; {pickles[0]} is a pickle and is not read" if pickles else "")
        )
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
