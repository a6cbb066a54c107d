"""Real pipelines of tiny size with random weights, saved like the folders of their hubs.

Tests run the recipes for pretrained teachers on them.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support import tiny_nets
from tests.support.tiny_nets import dc, kl

WORDS = "a the of face cat dog red blue green with smiling eyes grinning 0 1 2 3 4 5 6 7 8 9".split()
TEXT_WIDTH = tiny_nets.TEXT


def tokenizer(length: int = 16):
    """Words of a small list; starts and ends as CLIP's do."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def clip(projection: bool = False):
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=TEXT_WIDTH, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def two_towers(folder):
    """A whole CLIP with tokenizer and preprocessing, saved as its hub's folder is, for the CLIP score."""
    sizes = dict(hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=64, max_position_embeddings=16, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | dict(image_size=32, patch_size=8), projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def t5(width: int = TEXT_WIDTH):
    config = transformers.T5Config(vocab_size=64, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    return transformers.Gemma2Model(config)


def ddim(**more):
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **more
    )


def flow(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def dit():
    net = tiny_nets.dit()
    return diffusers.DiTPipeline(transformer=net, vae=kl(), scheduler=ddim(), id2label={i: str(i) for i in range(10)})


def sd():
    net = tiny_nets.sd()
    return diffusers.StableDiffusionPipeline(
        vae=kl(), text_encoder=clip(), tokenizer=tokenizer(), unet=net, scheduler=ddim(), safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    net = tiny_nets.sdxl(text=2 * TEXT_WIDTH, pooled=TEXT_WIDTH)
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(),
        text_encoder=clip(),
        text_encoder_2=clip(True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=net,
        scheduler=ddim(),
    )


def sd3():
    net = tiny_nets.sd3(text=2 * TEXT_WIDTH, pooled=2 * TEXT_WIDTH)
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=flow(shift=3.0), vae=kl(), text_encoder=clip(True), tokenizer=tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=tokenizer(), text_encoder_3=t5(2 * TEXT_WIDTH), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux():
    net = tiny_nets.flux(pooled=TEXT_WIDTH, guidance_embeds=True)
    return diffusers.FluxPipeline(
        transformer=net,
        scheduler=flow(shift=3.0),
        vae=kl(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def sana():
    net = tiny_nets.sana()
    return diffusers.SanaPipeline(
        transformer=net, scheduler=flow(shift=3.0), vae=dc(), text_encoder=gemma(), tokenizer=tokenizer()
    )


def pixart():
    net = tiny_nets.pixart()
    return diffusers.PixArtSigmaPipeline(
        transformer=net, scheduler=ddim(), vae=kl(), text_encoder=t5(), tokenizer=tokenizer()
    )


def chatting(length: int = 16):
    """The tokenizer of a language model: a prompt is a message, and its words are between a start and an end."""
    made = tokenizer(length)
    made.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    return made


def qwen3(layers: int = 2):
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3Model(config)


def z_image():
    return diffusers.ZImagePipeline(
        transformer=tiny_nets.z_image(), scheduler=flow(shift=3.0), vae=kl(shift_factor=0.1), text_encoder=qwen3(),
        tokenizer=chatting(),
    )  # fmt: skip


def flux2():
    """klein: three of the hidden states of a language model are its text."""
    return diffusers.Flux2KleinPipeline(
        transformer=tiny_nets.flux2(text=3 * TEXT_WIDTH, channels=16), scheduler=flow(shift=3.0),
        vae=tiny_nets.kl_flux2(), text_encoder=qwen3(28), tokenizer=chatting(),
    )  # fmt: skip


def hunyuan_image():
    return diffusers.HunyuanImagePipeline(
        transformer=tiny_nets.hunyuan_image(TEXT_WIDTH), scheduler=flow(shift=3.0),
        vae=tiny_nets.kl_hunyuan_image(), text_encoder=qwen3(3),
        tokenizer=tokenizer(80), text_encoder_2=t5(), tokenizer_2=tokenizer(),
        guider=diffusers.AdaptiveProjectedMixGuidance(), ocr_guider=diffusers.AdaptiveProjectedMixGuidance(),
    )  # fmt: skip


def lumina2():
    return diffusers.Lumina2Pipeline(
        transformer=tiny_nets.lumina2(), scheduler=flow(shift=3.0), vae=kl(shift_factor=0.1), text_encoder=gemma(),
        tokenizer=tokenizer(80),
    )  # fmt: skip


def aura_flow():
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=kl(), transformer=tiny_nets.aura_flow(), scheduler=flow(shift=1.7)
    )


def qwen_image():
    return diffusers.QwenImagePipeline(
        transformer=tiny_nets.qwen(), scheduler=flow(shift=3.0), vae=tiny_nets.kl_qwen(), text_encoder=qwen3(3),
        tokenizer=tokenizer(80),
    )  # fmt: skip


PIPELINES = {
    "dit": dit, "sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "sana": sana, "pixart": pixart,
    "z_image": z_image, "flux2": flux2,
    "hunyuan_image": hunyuan_image, "lumina2": lumina2, "aura_flow": aura_flow,
    "qwen_image": qwen_image,
}  # fmt: skip


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """The family's pipeline with random weights (no zero-initialised gate hides anything) in that folder."""
    torch.manual_seed(seed)
    pipeline = PIPELINES[family]()
    tiny_nets.with_random_weights(pipeline.components.get("transformer") or pipeline.components["unet"])
    pipeline.save_pretrained(folder)
    return folder


def copied(net):
    """Another network of the class and the weights of diffusers' own, without what we changed in it."""
    made = type(net).from_config(net.config)
    made.load_state_dict(net.state_dict())
    return made.eval()
