"""A trainable image autoencoder: diffusers' AutoencoderKL with the settings that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowmap.base.ranges import Depth, Width, check_ranges


@dataclass(frozen=True)
class AutoencoderKL:
    """A convolutional autoencoder with a Gaussian posterior.

    Each entry of `channels` after the first halves height and width. Source: Rombach et al. 2022, arXiv:2112.10752, in
    the implementation of diffusers.
    """

    channels: tuple[Width, ...] = (32, 64, 64)
    latent_channels: Width = 4
    layers: Depth = 1
    groups: Width = 8
    artifact: ClassVar[str] = "autoencoder"

    def __post_init__(self):
        check_ranges(self)
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels: {self.channels} must be multiples of groups ({self.groups})")

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = False, guidance: bool = False
    ) -> nn.Module:
        if len(shape) != 3 or any(side % 2 ** (len(self.channels) - 1) for side in shape[1:]):
            raise ValueError(f"channels: {len(self.channels)} levels do not halve a picture of shape {tuple(shape)}")
        return AutoencoderNet(self, shape)


class AutoencoderNet(nn.Module):
    """The autoencoder as a module; calling it reconstructs images.

    moments: (mean, log variance) of the posterior, each (B, c, h, w). decode: latents to images.
    """

    def __init__(self, spec: AutoencoderKL, shape: tuple[int, ...]):
        super().__init__()
        import diffusers

        levels = len(spec.channels)
        self.model = diffusers.AutoencoderKL(
            in_channels=shape[0],
            out_channels=shape[0],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=spec.channels,
            layers_per_block=spec.layers,
            latent_channels=spec.latent_channels,
            norm_num_groups=spec.groups,
            sample_size=shape[1],
            scaling_factor=1.0,
            shift_factor=0.0,
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample

    def forward(self, x: Tensor, t: Tensor | None = None, s: Tensor | None = None, cond=None) -> Tensor:
        return self.decode(self.moments(x)[0])

    @torch.no_grad()
    def normalisation(self, x: Tensor, batch_size: int = 256) -> tuple[float, float]:
        """(shift, scale) that normalise the latents of images x to mean 0 and standard deviation 1."""
        z = torch.cat([self.moments(x[i : i + batch_size])[0] for i in range(0, len(x), batch_size)])
        return float(z.mean()), float(1 / z.std().clamp_min(1e-6))
