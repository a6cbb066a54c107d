"""Exports a student's autoencoder for diffusers pipelines, which decode z / scaling_factor + shift_factor to [-1, 1].

Settings that a configuration cannot express are folded into the weights: a normalisation by channel into the 1x1
convolutions next to the latents, images in [0, 1] into the decoder's last layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.export.plan import Export
from flowmap.teachers.autoencoder import FRAMES, PATCHES

ENCODER_KEPT = (
    "The decoder of `vae/` gives pictures on [-1, 1], its encoder takes them on [0, 1] (zeros at its padded border are "
    "black there, so that no change of its weights would be the same)."
)


def exported_vae(plan: Export, *, shifts: bool = True, by_itself: bool = False) -> Any | None:
    """A copy on the CPU that decodes in a pipeline as the student does; None if samples are not latents.

    shifts: whether the pipeline reads shift_factor. by_itself: whether it normalises by the mean and variance that its
    autoencoder has by channel (FLUX.2, in the weights; QwenImage, in the configuration). Raises a ValueError if neither
    configuration nor weights can express the normalisation of latents.
    """
    frozen = plan.autoencoder()
    if frozen is None:
        return None
    vae = copy.deepcopy(frozen.model).cpu()
    if type(vae).__name__ in (*PATCHES, *FRAMES):
        _check_own(plan, vae, by_itself=by_itself)
        return vae
    shift, scale = _numbers(frozen.shift), _numbers(frozen.scale)
    if len(shift) == len(scale) == 1 and (shifts or not shift.any()):
        _set_normalisation(vae, float(scale), float(shift))
    else:
        fold_normalisation(vae, shift, scale)
        _set_normalisation(vae, 1.0, 0.0)
    if plan.unit:
        fold_unit(vae)
    return vae


def _check_own(plan: Export, vae: Any, *, by_itself: bool) -> None:
    """Raise a ValueError unless the pipeline normalises latents as this student's autoencoder does."""
    frozen, name = plan.autoencoder(), type(vae).__name__
    assert frozen is not None
    if not by_itself:
        what = "those of videos, which only QwenImage's stock pipeline decodes"
        if name in PATCHES:
            what = "patches, which only FLUX.2's stock pipelines decode"
        raise ValueError(f"autoencoder: {name}: its latents are {what}")
    own = torch.tensor(frozen.shift), torch.tensor(frozen.scale)
    for given, wanted in zip(own, _normalisation_of(vae), strict=True):
        if given.shape != wanted.shape or not torch.allclose(given.double(), wanted.double(), rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"autoencoder: {name}: its pipeline knows no other shift and scale than those that it has itself"
            )
    if plan.unit:
        raise ValueError(f"autoencoder: unit: {name} works on images on [-1, 1]")


def _normalisation_of(vae: Any) -> tuple[Tensor, Tensor]:
    """The shift and scale of latents by channel by which the pipelines of PATCHES and FRAMES normalise, float64."""
    if type(vae).__name__ in FRAMES:
        mean, std = (torch.tensor(vae.config[f"latents_{what}"], dtype=torch.float64) for what in ("mean", "std"))
        return mean, 1 / std
    return vae.bn.running_mean, (vae.bn.running_var.double() + vae.config.batch_norm_eps).rsqrt()


@torch.no_grad()
def fold_normalisation(vae: nn.Module, shift: Tensor, scale: Tensor) -> None:
    """Change `vae` so that its latents are (z - shift) * scale instead of z; shift and scale are (c,) or (1,).

    decode: W (u / scale + shift) + b. encode: the rows of quant_conv for the mean likewise; log-variances plus
    2 log(scale).
    """
    from diffusers import AutoencoderKL

    if not isinstance(vae, AutoencoderKL):
        what = "a shift" if len(shift) == len(scale) == 1 else "a shift or scale by channel"
        way = "; take --custom" if len(shift) == len(scale) == 1 else ""
        where = f"neither the weights of {type(vae).__name__} nor what this pipeline reads"
        raise ValueError(f"autoencoder: {what} of latents fits {where}{way}")
    _with_convolutions(vae)
    out, back = vae.quant_conv, vae.post_quant_conv
    channels = back.in_channels
    shift, scale = (value.to(back.weight.dtype).expand(channels) for value in (shift, scale))
    back.bias += back.weight[:, :, 0, 0] @ shift
    back.weight /= scale.view(1, -1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - shift) * scale
    out.weight[:channels] *= scale.view(-1, 1, 1, 1)
    out.bias[channels:] += 2 * scale.log()


@torch.no_grad()
def fold_unit(vae: nn.Module) -> None:
    """Change the decoder so that its output is 2 x - 1 instead of x. The encoder does not change."""
    from diffusers import AutoencoderDC, AutoencoderKL

    if not isinstance(vae, (AutoencoderKL, AutoencoderDC)):
        what = f"the decoder of {type(vae).__name__} has no last layer that can be put on [-1, 1]"
        raise ValueError(f"autoencoder: unit: {what}")
    last = vae.decoder.conv_out
    last.weight *= 2
    last.bias.mul_(2).sub_(1)


def _with_convolutions(vae: Any) -> None:
    """Add identity 1x1 convolutions next to the latents if the autoencoder has none."""
    for name, width in (("quant_conv", 2), ("post_quant_conv", 1)):
        if getattr(vae, name) is None:
            channels = width * vae.config.latent_channels
            layer = nn.Conv2d(channels, channels, 1, dtype=vae.dtype)
            layer.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))
            assert layer.bias is not None
            layer.bias.zero_()
            setattr(vae, name, layer.requires_grad_(False))
            vae.register_to_config(**{f"use_{name}": True})


def _set_normalisation(vae: Any, scale: float, shift: float) -> None:
    """Set scaling_factor and shift_factor in the config; a shift also for classes without it, for our pipeline."""
    factors = {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
    vae.register_to_config(**{key: value for key, value in factors.items() if key in vae.config or value})


def _numbers(values) -> Tensor:
    """The values as (1,) if all are equal, otherwise (c,)."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    return values[:1] if bool((values == values[0]).all()) else values
