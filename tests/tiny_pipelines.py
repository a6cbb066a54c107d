"""Real pipelines at tiny size with random weights, saved as their hubs' folders are: what recipes for pretrained teachers are tried on."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "a the of face cat dog red blue green with smiling eyes grinning 0 1 2 3 4 5 6 7 8 9".split()
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
ENDS = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TEXT_WIDTH = 32


def tokenizer(length: int = 16):
    """Words of a small list; starts and ends as CLIP's do."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def clip(projection: bool = False):
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
        projection_dim=TEXT_WIDTH, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int = TEXT_WIDTH):
    config = transformers.T5Config(vocab_size=64, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
    )
    return transformers.Gemma2Model(config)


def kl(latent_channels: int = 4):
    return diffusers.AutoencoderKL(**ENDS, latent_channels=latent_channels, norm_num_groups=4, sample_size=16, scaling_factor=0.6)


def dc():
    return diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    )  # fmt: skip


def ddim(**more):
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **more)


def flow(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def dit():
    net = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4
    )
    return diffusers.DiTPipeline(transformer=net, vae=kl(), scheduler=ddim(), id2label={i: str(i) for i in range(10)})


def sd():
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=8,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=kl(), text_encoder=clip(), tokenizer=tokenizer(), unet=net, scheduler=ddim(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * TEXT_WIDTH, attention_head_dim=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(), text_encoder=clip(), text_encoder_2=clip(True), tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=net, scheduler=ddim()
    )


def sd3():
    net = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=flow(shift=3.0), vae=kl(), text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=tokenizer(), text_encoder_3=t5(2 * TEXT_WIDTH), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux():
    net = diffusers.FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=net, scheduler=flow(shift=3.0), vae=kl(), text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer()
    )


def sana():
    net = diffusers.SanaTransformer2DModel(
        **HEADS, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=TEXT_WIDTH, sample_size=8,
    )  # fmt: skip
    return diffusers.SanaPipeline(transformer=net, scheduler=flow(shift=3.0), vae=dc(), text_encoder=gemma(), tokenizer=tokenizer())


def pixart():
    net = diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=TEXT_WIDTH,
        use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(transformer=net, scheduler=ddim(), vae=kl(), text_encoder=t5(), tokenizer=tokenizer())


PIPELINES = {"dit": dit, "sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "sana": sana, "pixart": pixart}


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """The family's pipeline with random weights (no zero-initialised gate hides anything) in that folder."""
    torch.manual_seed(seed)
    pipeline = PIPELINES[family]()
    net = pipeline.components.get("transformer") or pipeline.components["unet"]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder
