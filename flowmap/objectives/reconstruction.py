"""Training an autoencoder: its latents decode to the picture, and their posterior stays near a Gaussian.

Source: Kingma and Welling 2013, arXiv:1312.6114; weights as in Rombach et al. 2022, arXiv:2112.10752, without its
discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from flowmap.base.ranges import FromZero, check_ranges
from flowmap.flow.parts import BaseObjective
from flowmap.flow.types import Loss, PathSample, Teacher


class PictureCoder(Protocol):
    """An autoencoder of pictures. moments(x): mean and log-variance of the latents; decode(z): pictures of latents."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor) -> Tensor: ...


class PictureStudent(Protocol):
    @property
    def net(self) -> PictureCoder: ...


@dataclass(frozen=True)
class Reconstruction(BaseObjective):
    """mean |x0 - D(z)| + squared * mean (x0 - D(z))^2 + kl * KL(posterior || N(0, 1)) per latent entry.

    z is drawn with the sample's noise. The student's network is an autoencoder (moments, decode). Times and teacher are
    not used.
    """

    squared: FromZero = 1.0
    kl: FromZero = 1e-4
    diagonal: ClassVar[bool] = True
    artifact: ClassVar[str] = "autoencoder"

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, student: PictureStudent, teacher: Teacher | None, sample: PathSample, step: int) -> Loss:
        mean, logvar = student.net.moments(sample.x0)
        if mean[0].numel() > sample.x1[0].numel():
            raise ValueError("student.latent_channels: latents have more entries than pictures")
        noise = sample.x1.flatten(1)[:, : mean[0].numel()].view_as(mean)
        error = student.net.decode(mean + (logvar / 2).exp() * noise) - sample.x0
        kl = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1) / 2
        absolute, squared = error.abs().flatten(1).mean(1), error.square().flatten(1).mean(1)
        value = (absolute + self.squared * squared + self.kl * kl).mean()
        return Loss(
            value, {"absolute": absolute.mean().detach(), "squared": squared.mean().detach(), "kl": kl.mean().detach()}
        )
