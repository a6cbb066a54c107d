"""EDM's networks, DDPM++ (with its NCSN++ variant) and ADM: their settings, and their velocity on our clock.

Sources: Karras et al. 2022, arXiv:2206.00364 (tables 6 to 8 and appendix F); Song et al. 2021, arXiv:2011.13456;
Dhariwal and Nichol 2021, arXiv:2105.05233. Layers have the names of the published weights, so that these load
unchanged. The input for augmentation labels, which is zero in sampling, is omitted. Arrival and guidance branches,
which start at zero, are added to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flowmap.base.ranges import BelowOne, Depth, Multiplier, Positive, Side, Width, check_ranges
from flowmap.nets.edm_unet import Block, DhariwalUNet, SongUNet, UNet
from flowmap.nets.embed import ScalarEmbedding, branches
from flowmap.nets.preconditioning import one_hot, velocity_of

PRESETS = {"cifar10": (2, 2, 2), "ffhq": (1, 2, 2, 2), "afhqv2": (1, 2, 2, 2)}


@dataclass(frozen=True)
class DDPMpp:
    """Settings of EDM's DDPM++; channels are a multiple of 32.

    preset: cifar10, ffhq or afhqv2, defines the multipliers unless they are given. ncsnpp: the NCSN++ variant (random
    Fourier features of the noise level, a residual path parallel to the encoder, a filter with four taps). sigma_data:
    the data's std, 0.5 in the published models. dropout: in training only; EDM used 0.13 (CIFAR-10), 0.05 (FFHQ) and
    0.25 (AFHQ).
    """

    preset: str = "cifar10"
    channels: Width = 128
    multipliers: tuple[Multiplier, ...] | None = None
    num_blocks: Depth = 4
    attention_at: tuple[Side, ...] = (16,)
    ncsnpp: bool = False
    sigma_data: Positive = 0.5
    dropout: BelowOne = 0.0

    def __post_init__(self):
        check_ranges(self)
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        _check_channels(self, self.levels, 32)

    @property
    def levels(self) -> tuple[int, ...]:
        return PRESETS[self.preset] if self.multipliers is None else self.multipliers

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> nn.Module:
        sizes = (_square(shape, self.levels), self.channels, self.levels, self.num_blocks, self.attention_at)
        unet = SongUNet(*sizes, num_classes, ncsnpp=self.ncsnpp, dropout=self.dropout)
        return EDMNet(unet, self.sigma_data, num_classes, arrival, guidance)


@dataclass(frozen=True)
class ADM:
    """Settings of EDM's ADM; the defaults are those for ImageNet-64. channels are a multiple of 64.

    sigma_data: the data's std. dropout: in training only; EDM used 0.1.
    """

    channels: Width = 192
    multipliers: tuple[Multiplier, ...] = (1, 2, 3, 4)
    num_blocks: Depth = 3
    attention_at: tuple[Side, ...] = (32, 16, 8)
    sigma_data: Positive = 0.5
    dropout: BelowOne = 0.0

    def __post_init__(self):
        check_ranges(self)
        _check_channels(self, self.multipliers, 64)

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> nn.Module:
        size = _square(shape, self.multipliers)
        sizes = (size, self.channels, self.multipliers, self.num_blocks, self.attention_at)
        unet = DhariwalUNet(*sizes, num_classes, dropout=self.dropout)
        return EDMNet(unet, self.sigma_data, num_classes, arrival, guidance)


class EDMNet(nn.Module):
    """F(x, t, s, cond) for x (B, C, H, H), the velocity of preconditioning.py. A class of -1 is no class."""

    def __init__(self, unet: UNet, sigma_data: float, num_classes: int | None, arrival: bool, guidance: bool):
        super().__init__()
        self.sigma_data, self.num_classes = sigma_data, num_classes
        self.model = unet
        width = unet.map_layer1.out_features
        self.arrival = ScalarEmbedding(width, silent=True) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        cond = cond or {}
        labels, extra = one_hot(x, cond, self.num_classes), branches(self.arrival, self.guidance, t, s, cond)
        return velocity_of(lambda scaled, noise: self.model(scaled, noise, labels, extra), x, t, self.sigma_data)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the encoder and the decoder in order."""
        return [layer for layer in (*self.model.enc.values(), *self.model.dec.values()) if isinstance(layer, Block)]

    @property
    def activation_checkpointing(self) -> bool:
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on


def _check_channels(spec: DDPMpp | ADM, multipliers: tuple[int, ...], unit: int) -> None:
    if spec.channels % unit:
        raise ValueError(f"channels: {spec.channels} must be a multiple of {unit}")
    if not multipliers:
        raise ValueError("multipliers: () must have at least one entry")


def _square(shape: tuple[int, ...], multipliers: tuple[int, ...]) -> tuple[int, int]:
    """(channels, side) of a sample; ValueError unless it is square and can be halved between the levels."""
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 ** (len(multipliers) - 1):
        raise ValueError(f"multipliers: {len(multipliers)} levels do not halve a square sample of shape {tuple(shape)}")
    return shape[0], shape[1]
