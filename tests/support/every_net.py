"""Every network that a compiled step goes through: one of each kind and of each diffusers class, small and wide.

The small ones are tiny. The wide ones have the channels, heads and text of a full-scale network of their kind, and one
block, or one level of a U-Net, on small samples: compiling takes as long as the graph is large, whatever the width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.nets import ADM, EDM2, MLP, DDPMpp, DiT, Stacked, TextJoint, TextVAE
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.module import Module, ModuleNet
from tests.support import tiny_nets
from tests.support.families import FLOW, NOISE, OURS, SHAPE, TWO_LEVELS, Built, pretrained

WITHOUT_DERIVATIVE = {
    "autoencoder_kl": "no flow map",
    "text_vae": "no flow map",
    "text_pair": "no flow map",
    "conv_prior": "no flow map: it gives the mean and variance of a start",
    "transformer_prior": "no flow map: it gives the mean and variance of a start",
}
"""The kinds of NETS that no derivative is taken of."""


@dataclass(frozen=True)
class Sized:
    """build() is a network for samples of that shape; conditions: the shape of a sample's, by key; std: of weights."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = SHAPE
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    std: float = 0.1
    batch: int = 4

    def student(self, seed: int = 0) -> FlowMapNet:
        """The flow map with random weights everywhere: zeros would hide the layers behind them."""
        torch.manual_seed(seed)
        return FlowMapNet(tiny_nets.with_random_weights(self.build(), self.std)).train()

    def draw(self, rows: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """x, v, t, s and cond of a batch."""
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(rows, *shape, generator=generator).to(dtype)
        x, v, t = normal(*self.shape), normal(*self.shape), 0.2 + 0.7 * torch.rand(rows, generator=generator)
        cond: dict[str, Tensor] = {key: normal(*shape) for key, shape in self.conditions.items()}
        cond |= {"class": torch.arange(rows) % 7, "guidance": torch.linspace(1, 3, rows, dtype=dtype)}
        return {"x": x, "t": t, "s": t / 3, "velocity": v, "cond": cond}


class Own(nn.Module):
    """A network of one's own: a convolution between two norms, its time embedding a submodule."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.time, self.label = nn.Sequential(nn.Linear(1, width), nn.SiLU()), nn.Embedding(8, width)
        self.enter, self.leave = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.norm, self.middle = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = self.enter(x) + (self.time(t[:, None]) + self.label(label))[:, :, None, None]
        return self.leave(F.silu(self.norm(h + self.middle(F.silu(h)))))


def own(width: int) -> Callable[[], nn.Module]:
    spec = Module(module="own", classes=7, null_class=7, time_embedding="time")
    return lambda: ModuleNet(Own(SHAPE[0], width), spec, SHAPE, arrival=True, guidance=True)


def text(slots: int, dims: int, **flow) -> Callable[[], nn.Module]:
    """Language Rectified Flow's network, a transformer on the latents of sentences, with its autoencoder."""
    coder = TextVAE(slots=slots, dims=dims, width=16, depth=1, heads=2)
    joint = TextJoint(DiT(patch=1, depth=1, **flow), coder, vocab=50, special=(0, 1, 2, 3))
    return lambda: joint.build((12,), **OURS)


def ours(spec: Any, shape: tuple[int, ...] = SHAPE, **more) -> Built:
    return Built(lambda: spec, shape, OURS, more)


def code(size: int) -> dict[str, Any]:
    """LeDiFlow's condition: the code of the learned prior."""
    return {"extra_conditions": (ExtraCondition("z", size, "code"),)}


WORDS = {"text": (5, tiny_nets.TEXT), "pooled": (tiny_nets.POOLED,)}
SMALL = {
    "mlp": Sized(ours(MLP(width=16, depth=1))),
    "dit": Sized(ours(DiT(preset="nano", depth=1))),
    "text_joint": Sized(text(8, 4, preset="nano"), (4, 1, 8)),
    "lediflow": Sized(ours(DiT(preset="nano", depth=1), **code(6)), conditions={"z": (6,)}),
    "module": Sized(own(16)),
    "stacked": Sized(ours(Stacked(DiT(preset="nano", depth=1)))),
    "edm2": Sized(ours(EDM2(channels=16, **TWO_LEVELS))),
    "edm_ddpmpp": Sized(ours(DDPMpp(channels=32, **TWO_LEVELS))),
    "edm_ddpmpp, ncsnpp": Sized(ours(DDPMpp(channels=32, ncsnpp=True, **TWO_LEVELS))),
    "edm_adm": Sized(ours(ADM(channels=64, **TWO_LEVELS))),
    "DiTTransformer2DModel": Sized(pretrained(lambda: tiny_nets.dit(num_layers=1), NOISE)),
    "PixArtTransformer2DModel": Sized(pretrained(lambda: tiny_nets.pixart(num_layers=1), NOISE), conditions=WORDS),
    "SanaTransformer2DModel": Sized(pretrained(tiny_nets.sana, FLOW), conditions=WORDS),
    "SD3Transformer2DModel": Sized(pretrained(tiny_nets.sd3, FLOW), conditions=WORDS),
    "FluxTransformer2DModel": Sized(pretrained(tiny_nets.flux, FLOW), conditions=WORDS),
    "QwenImageTransformer2DModel": Sized(pretrained(tiny_nets.qwen, FLOW), conditions=WORDS),
    "ZImageTransformer2DModel": Sized(pretrained(tiny_nets.z_image, FLOW), conditions=WORDS),
    "Flux2Transformer2DModel": Sized(pretrained(tiny_nets.flux2, FLOW), conditions=WORDS),
    "HunyuanImageTransformer2DModel": Sized(pretrained(tiny_nets.hunyuan_image, FLOW), conditions=WORDS),
    "Lumina2Transformer2DModel": Sized(pretrained(tiny_nets.lumina2, FLOW), conditions=WORDS),
    "AuraFlowTransformer2DModel": Sized(pretrained(tiny_nets.aura_flow, FLOW), conditions=WORDS),
    "UNet2DModel": Sized(pretrained(lambda: tiny_nets.unet(8), NOISE, (3, 8, 8)), (3, 8, 8)),
    "UNet2DConditionModel": Sized(pretrained(tiny_nets.sd, NOISE), conditions=WORDS),
}
"""By kind, or by class of diffusers. UNet2DConditionModel is InstaFlow's network, text_joint Language Rectified Flow's,
lediflow LeDiFlow's."""

LEVEL: dict[str, Any] = {"num_blocks": 1, "attention_at": (16,)}


def wide_pretrained(name: str, scheduler: str, shape: tuple[int, ...], **settings) -> Callable[[], nn.Module]:
    return pretrained(lambda: getattr(tiny_nets.diffusers, name)(**settings), scheduler, shape)


def wide(build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int = 2, **conditions) -> Sized:
    return Sized(build, shape, conditions, std=0.02, batch=batch)


def unet(**heads) -> Sized:
    """One level of the U-Net of published DDPMs."""
    settings = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (256,), "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",),
    }  # fmt: skip
    return wide(wide_pretrained("UNet2DModel", NOISE, (3, 16, 16), **settings, **heads), (3, 16, 16))


WIDE = {
    "mlp": wide(ours(MLP(width=1024, depth=1), (256,)), (256,), 64),
    "dit": wide(ours(DiT(preset="XL", depth=1), (4, 16, 16)), (4, 16, 16)),
    "text_joint": wide(text(8, 64, preset="S"), (64, 1, 8), 16),
    "lediflow": wide(ours(DiT(preset="B", depth=1), (4, 16, 16), **code(256)), (4, 16, 16), z=(256,)),
    "module": wide(own(256), SHAPE),
    "stacked": wide(ours(Stacked(DiT(preset="S", depth=1)), (4, 16, 16)), (4, 16, 16)),
    "edm2": wide(ours(EDM2("S", multipliers=(1,), **LEVEL), (4, 16, 16)), (4, 16, 16)),
    "edm_ddpmpp": wide(ours(DDPMpp(multipliers=(2,), **LEVEL), (3, 16, 16)), (3, 16, 16)),
    "edm_ddpmpp, ncsnpp": wide(ours(DDPMpp(multipliers=(1, 2), ncsnpp=True, **LEVEL), (3, 16, 16)), (3, 16, 16)),
    "edm_adm": wide(ours(ADM(multipliers=(1,), **LEVEL), (3, 16, 16)), (3, 16, 16)),
    "DiTTransformer2DModel": wide(
        wide_pretrained(
            "DiTTransformer2DModel", NOISE, (4, 16, 16), num_attention_heads=16, attention_head_dim=72, in_channels=4,
            out_channels=8, num_layers=1, sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
            attention_bias=True, activation_fn="gelu-approximate", norm_elementwise_affine=False,
        ),
        (4, 16, 16),
    ),
    "PixArtTransformer2DModel": wide(
        wide_pretrained(
            "PixArtTransformer2DModel", NOISE, (4, 16, 16), num_attention_heads=16, attention_head_dim=72,
            in_channels=4, out_channels=8, num_layers=1, sample_size=16, patch_size=2, cross_attention_dim=1152,
            caption_channels=4096, use_additional_conditions=False,
        ),
        (4, 16, 16), text=(16, 4096),
    ),
    "SanaTransformer2DModel": wide(
        wide_pretrained(
            "SanaTransformer2DModel", FLOW, (32, 8, 8), num_attention_heads=70, attention_head_dim=32, patch_size=1,
            in_channels=32, out_channels=32, num_layers=1, num_cross_attention_heads=20, cross_attention_head_dim=112,
            cross_attention_dim=2240, caption_channels=2304, sample_size=8,
        ),
        (32, 8, 8), text=(16, 2304),
    ),
    "SD3Transformer2DModel": wide(
        wide_pretrained(
            "SD3Transformer2DModel", FLOW, (16, 8, 8), sample_size=8, patch_size=2, in_channels=16, out_channels=16,
            num_layers=2, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=8, qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        (16, 8, 8), text=(16, 4096), pooled=(2048,),
    ),
    "FluxTransformer2DModel": wide(
        wide_pretrained(
            "FluxTransformer2DModel", FLOW, (16, 8, 8), in_channels=64, num_layers=1, num_single_layers=1,
            attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        (16, 8, 8), text=(16, 4096), pooled=(768,),
    ),
    "QwenImageTransformer2DModel": wide(
        wide_pretrained(
            "QwenImageTransformer2DModel", FLOW, (16, 8, 8), patch_size=2, in_channels=64, out_channels=16,
            num_layers=1, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584,
        ),
        (16, 8, 8), text=(16, 3584),
    ),
    "ZImageTransformer2DModel": wide(
        wide_pretrained("ZImageTransformer2DModel", FLOW, (16, 8, 8), n_layers=1, n_refiner_layers=1),
        (16, 8, 8), text=(16, 2560),
    ),
    "Flux2Transformer2DModel": wide(
        wide_pretrained(
            "Flux2Transformer2DModel", FLOW, (128, 4, 4), num_layers=1, num_single_layers=1, num_attention_heads=24,
            joint_attention_dim=7680, guidance_embeds=False,
        ),
        (128, 4, 4), text=(16, 7680),
    ),
    "HunyuanImageTransformer2DModel": wide(
        wide_pretrained(
            "HunyuanImageTransformer2DModel", FLOW, (64, 4, 4), num_layers=1, num_single_layers=1,
            num_refiner_layers=1, text_embed_2_dim=1472,
        ),
        (64, 4, 4), text=(16, 3584),
    ),
    "Lumina2Transformer2DModel": wide(
        wide_pretrained("Lumina2Transformer2DModel", FLOW, (16, 8, 8), num_layers=1, cap_feat_dim=2304),
        (16, 8, 8), text=(16, 2304),
    ),
    "AuraFlowTransformer2DModel": wide(
        wide_pretrained("AuraFlowTransformer2DModel", FLOW, (4, 8, 8), num_mmdit_layers=1, num_single_dit_layers=1),
        (4, 8, 8), text=(16, 2048),
    ),
    "UNet2DModel": unet(attention_head_dim=None),
    "UNet2DConditionModel": wide(
        wide_pretrained(
            "UNet2DConditionModel", NOISE, (4, 16, 16), sample_size=16, in_channels=4, out_channels=4,
            block_out_channels=(320,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=768, attention_head_dim=8,
        ),
        (4, 16, 16), text=(77, 768),
    ),
}  # fmt: skip
"""The same networks at the width of those in teachers/, of published models of their class, or of our recipes."""

MORE = {"UNet2DModel, heads of 8": unet()}
"""Other heads than those of published models: the default of diffusers' class."""

SIZES = {"small": SMALL, "wide": {**WIDE, **MORE}}
