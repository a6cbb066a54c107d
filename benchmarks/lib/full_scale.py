"""The networks of the full-scale recipes with random weights, at full size or at toy size: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flowmap.build.teacher import teacher_of_networks
from flowmap.estimate.networks import config_without_weights, teacher_configs
from flowmap.estimate.outlines import Outlines
from flowmap.flow.types import Cond, PathSample, Teacher
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.edm2 import EDM2, fold_filters
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import hold
from flowmap.plan.plan import ResolvedRun, resolve
from flowmap.recipe import Recipe, read_recipe
from flowmap.recipe.recipe import list_recipes
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of, empty_of
from flowmap.train.module import trained

SDXL = {  # a UNet2DConditionModel of three levels
    "block_out_channels": [8, 16, 16], "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4,
    "sample_size": 8, "transformer_layers_per_block": 1, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}  # fmt: skip
TOY = {  # settings of diffusers networks at toy size
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4},
    "UNet2DConditionModel": {
        "block_out_channels": [8, 16, 16, 16], "cross_attention_dim": 8, "attention_head_dim": 2,
        "norm_num_groups": 4, "sample_size": 8,
    },
    "SD3Transformer2DModel": {
        "attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2, "joint_attention_dim": 16,
        "caption_projection_dim": 16, "pooled_projection_dim": 16, "sample_size": 8, "pos_embed_max_size": 8,
        "dual_attention_layers": [0],
    },
    "SanaTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "num_layers": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 4,
    },
    "FluxTransformer2DModel": {
        "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6],
    },
    "ZImageTransformer2DModel": {
        "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
        "axes_dims": [4, 4, 8],
    },
    "Flux2Transformer2DModel": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": [4, 4, 4, 4],
    },
    "HunyuanImageTransformer2DModel": {
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "text_embed_dim": 16, "text_embed_2_dim": 16, "rope_axes_dim": [8, 8],
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
        "axes_dims_rope": [4, 4, 8],
    },
    "AuraFlowTransformer2DModel": {
        "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "caption_projection_dim": 32, "sample_size": 4, "pos_embed_max_size": 16,
    },
    "PixArtTransformer2DModel": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 16, "sample_size": 4,
    },
    "Lumina2Transformer2DModel": {
        "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 8, "cap_feat_dim": 16, "axes_dim_rope": [8, 8, 8],
    },
}  # fmt: skip


def full_scale() -> list[str]:
    """The shipped recipes for several devices."""
    return [name for name in list_recipes() if read_recipe(name).trainer.devices > 1]


def with_data(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with a value for every setting that a user must give."""
    return read_recipe(name, [*(f"{key}=given" for key in read_recipe(name).missing()), *overrides])


@dataclass(frozen=True)
class FullScale:
    """A full-scale recipe with the configurations of its student and of the networks of its teacher."""

    run: ResolvedRun
    config: StudentConfig
    teachers: Sequence[StudentConfig]

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def rows(self) -> int:
        """The samples of a micro-batch."""
        return self.recipe.data.batch_size

    @staticmethod
    def of(name: str, toy: bool = False, overrides: Sequence[str] = ()) -> FullScale:
        recipe = with_data(name, overrides)
        if toy:
            recipe = recipe.changed(data=replace(recipe.data, batch_size=2, global_batch_size=None))
        run = resolve(recipe)
        config = config_without_weights(run, Outlines().of(run, whole=False)[0])
        if config is None:
            raise ValueError(f"{name}: nothing states its network")
        teachers = [one for _, one in teacher_configs(run, config)]
        if toy:
            config, *teachers = (shrunk(one) for one in (config, *teachers))
        return FullScale(run, config, teachers)


def shrunk(config: StudentConfig) -> StudentConfig:
    """The configuration of the same kind of network at toy size."""
    net, shape = config.net, config.shape
    if isinstance(net, DiffusersModel):
        own = json.loads(net.settings)
        settings = own | (SDXL if "addition_time_embed_dim" in own else TOY[net.network])
        side = 8 if net.network == "UNet2DConditionModel" else 4
        return replace(config, net=replace(net, settings=json.dumps(settings)), shape=(shape[0], side, side))
    if isinstance(net, EDM2):
        net = replace(net, channels=8, multipliers=(1, 2), num_blocks=1, attention_at=())
    return replace(config, net=net, shape=(shape[0], 8, 8))


@dataclass(frozen=True)
class Built:
    """A student and its guided teacher with random weights on a device."""

    student: FlowMapNet
    teacher: Teacher | None
    cond: Cond

    @staticmethod
    def of(scale: FullScale, device: torch.device, half: bool) -> Built:
        """half: the frozen networks are in bf16."""
        with torch.device(device):
            frozen = [one.build().to(device).eval().requires_grad_(False) for one in scale.teachers]
            for net in frozen:
                with_gains(net)
                fold_filters(net)
                hold(net, torch.bfloat16 if half else torch.float32)
            if scale.config.lora is None:
                student = scale.config.build().to(device).train()
            else:  # the adapters' base is the teacher's network
                student = scale.config.build(frozen[0].net).to(device).train()
            cond = {key: value.to(device) for key, value in conditions_of(scale.config, scale.rows).items()}
        with_gains(student)
        teacher = teacher_of_networks(scale.recipe, frozen, empty_of(cond)) if frozen else None
        return Built(student, None if teacher is None else teacher.guided, cond)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return trained(self.student)


def with_gains(net: FlowMapNet) -> None:
    """Set EDM2's gains, which are 0 in a network without training."""
    for gain in (p for p in net.parameters() if p.ndim == 0):
        gain.data.fill_(0.5)


def sample_of(scale: FullScale, built: Built, seed: int = 0) -> PathSample:
    """The points of one micro-batch: Gaussian data, the recipe's times."""
    device = next(built.student.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    x0, x1 = (torch.randn(scale.rows, *scale.config.shape, generator=generator, device=device) for _ in range(2))
    t, s = scale.recipe.times(scale.rows, device=device, generator=generator)
    return scale.recipe.path.sample(x0, x1, t, s, built.cond or None)
