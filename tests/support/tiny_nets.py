"""diffusers' networks at tiny size: one function a family, real architectures; nothing is downloaded.

Text is 32 wide and a pooled text 24, unless given; samples are (4, 8, 8), a UNet2DModel's (3, 16, 16).
A test is skipped without diffusers.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT, POOLED = 32, 24
ENDS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@torch.no_grad()
def with_random_weights(net, scale: float = 0.05):
    """The same network with every weight drawn from N(0, scale^2) by torch's generator.

    Zero-initialised gates would hide the layers behind them.
    """
    for parameter in net.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape))
    return net


def dit(channels: int = 4, num_layers: int = 2):
    return diffusers.DiTTransformer2DModel(
        **HEADS,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def unet(sample_size: int = 16):
    return diffusers.UNet2DModel(
        sample_size=sample_size, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def sd(text: int = TEXT, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text, attention_head_dim=8, **more,
    )  # fmt: skip


def sdxl(text: int = TEXT, pooled: int = POOLED):
    return sd(
        text,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + 6 * 8,
    )


def sd3(text: int = TEXT, pooled: int = POOLED):
    return diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=text,
        caption_projection_dim=32,
        pooled_projection_dim=pooled, out_channels=4,
    )  # fmt: skip


def flux(pooled: int = POOLED, guidance_embeds: bool = False):
    return diffusers.FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
        pooled_projection_dim=pooled,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip


def sana():
    return diffusers.SanaTransformer2DModel(
        **HEADS, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=TEXT, sample_size=8,
    )  # fmt: skip


def pixart(num_layers: int = 2):
    return diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=num_layers, sample_size=8, patch_size=2,
        cross_attention_dim=32, caption_channels=TEXT,
        use_additional_conditions=False,
    )  # fmt: skip


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
    )


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
        axes_dims=[4, 4, 8], axes_lens=[128, 16, 16],
    )  # fmt: skip


def flux2(guidance_embeds: bool = False, text: int = TEXT, channels: int = 4):
    return diffusers.Flux2Transformer2DModel(
        **HEADS, in_channels=channels, num_layers=1, num_single_layers=1, joint_attention_dim=text,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip


def hunyuan_image(second_text: int | None = 16):
    return diffusers.HunyuanImageTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=TEXT, text_embed_2_dim=second_text, rope_axes_dim=(8, 8),
    )  # fmt: skip


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, cap_feat_dim=TEXT, axes_dim_rope=(8, 8, 8), axes_lens=(128, 16, 16),
    )  # fmt: skip


def aura_flow():
    return diffusers.AuraFlowTransformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, joint_attention_dim=TEXT, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip


def kl_hunyuan_image():
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.6,
    )  # fmt: skip


def kl_qwen():
    """An autoencoder of videos, whose latents have a mean and a standard deviation by channel."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    )  # fmt: skip


def kl_flux2():
    """Latents of 4 x 2 x 2 channels, with a mean and a variance of their own."""
    made = diffusers.AutoencoderKLFlux2(**ENDS, latent_channels=4, norm_num_groups=4, sample_size=16)
    torch.nn.init.normal_(made.bn.running_mean)
    torch.nn.init.uniform_(made.bn.running_var, 0.5, 2.0)
    return made


def kl(latent_channels: int = 4, scaling_factor: float = 0.6, **more):
    return diffusers.AutoencoderKL(
        **ENDS,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        **more,
    )


def dc():
    return diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    )  # fmt: skip
