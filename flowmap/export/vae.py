"""A student's autoencoder as diffusers pipelines decode with it: z / scaling_factor + shift_factor in, pictures in [-1, 1] out.

What a configuration cannot say goes into the weights: a normalisation by channel into the 1x1 convolutions beside the latents, pictures on
[0, 1] into the decoder's last layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.export.plan import Export

ENCODER_KEPT = (
    "The decoder of `vae/` gives pictures on [-1, 1], its encoder takes them on [0, 1] (zeros at its padded border are black there, so that "
    "no change of its weights would be the same)."
)


def exported_vae(plan: Export, *, shifts: bool = True) -> Any | None:
    """A copy on the CPU that decodes in a pipeline as the student does; None where samples are no latents.

    shifts: the pipeline reads shift_factor. ValueError where neither configuration nor weights can say how latents are scaled.
    """
    frozen = plan.autoencoder()
    if frozen is None:
        return None
    vae = copy.deepcopy(frozen.model).cpu()
    shift, scale = _numbers(frozen.shift), _numbers(frozen.scale)
    if len(shift) == len(scale) == 1 and (shifts or not shift.any()):
        _log_line(vae, float(scale), float(shift))
    else:
        fold_normalisation(vae, shift, scale)
        _log_line(vae, 1.0, 0.0)
    if plan.unit:
        fold_unit(vae)
    return vae


@torch.no_grad()
def fold_normalisation(vae: nn.Module, shift: Tensor, scale: Tensor) -> None:
    """Makes `vae` give (z - shift) * scale where it gave z, and take it back; shift and scale are (c,) or (1,).

    decode: W (u / scale + shift) + b; encode: the mean's rows of quant_conv likewise, log-variances plus 2 log(scale).
    """
    from diffusers import AutoencoderKL

    if not isinstance(vae, AutoencoderKL):
        what = "a shift" if len(shift) == len(scale) == 1 else "a shift or scale by channel"
        way = "; take --custom" if len(shift) == len(scale) == 1 else ""
        raise ValueError(
            f"autoencoder: {what} of latents fits neither the weights of {type(vae).__name__} nor what this pipeline reads{way}"
        )
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
    """Makes the decoder give 2 x - 1 where it gave x. The encoder stays as it is."""
    from diffusers import AutoencoderDC, AutoencoderKL

    if not isinstance(vae, (AutoencoderKL, AutoencoderDC)):
        raise ValueError(
            f"autoencoder: unit: the decoder of {type(vae).__name__} has no last layer that can be put on [-1, 1]"
        )
    last = vae.decoder.conv_out
    last.weight *= 2
    last.bias.mul_(2).sub_(1)


def _with_convolutions(vae: Any) -> None:
    """1x1 convolutions that change nothing, where the autoencoder has none beside its latents."""
    for name, width in (("quant_conv", 2), ("post_quant_conv", 1)):
        if getattr(vae, name) is None:
            channels = width * vae.config.latent_channels
            layer = nn.Conv2d(channels, channels, 1, dtype=vae.dtype)
            layer.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))
            assert layer.bias is not None
            layer.bias.zero_()
            setattr(vae, name, layer.requires_grad_(False))
            vae.register_to_config(**{f"use_{name}": True})


def _log_line(vae: Any, scale: float, shift: float) -> None:
    """The normalisation in the configuration, in its first words alone; a shift also where the class knows none (our pipeline reads it)."""
    said = {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
    vae.register_to_config(**{key: value for key, value in said.items() if key in vae.config or value})


def _numbers(values) -> Tensor:
    """(1,) where all are the same, else (c,)."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    return values[:1] if bool((values == values[0]).all()) else values
