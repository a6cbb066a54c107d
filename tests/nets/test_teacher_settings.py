"""Every setting of a diffusers scheduler, network or pipeline is honoured, irrelevant, or refused by name."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowmap.flow.limit import Clip, Threshold
from flowmap.nets import teacher_settings as settings
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.teacher_settings import (
    check_network_settings,
    check_pipeline_settings,
    check_scheduler_settings,
    clock_of,
    limit_of,
)
from flowmap.nets.weight_files import check_weight_files
from tests.support import tiny_nets
from tests.support.tiny_nets import unet, with_random_weights

diffusers = pytest.importorskip("diffusers")
DOCS = Path(__file__).parents[2] / "docs" / "guide" / "teachers.md"


def schedulers():
    """Every scheduler of this diffusers that has a clock of ours and is not refused as a whole."""
    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        try:
            made = getattr(diffusers, name)()
            clock_of(made)
        except Exception:  # needs arguments or a library, or has no clock
            continue
        if name not in settings.REFUSED_SCHEDULERS:
            yield made


KNOWN = {type(made).__name__: made for made in schedulers()}


@pytest.mark.parametrize("name", KNOWN)
def test_every_setting_of_every_scheduler_is_known(name):
    read = set(inspect.signature(type(KNOWN[name]).__init__).parameters) - {"self", "kwargs"}
    assert len(KNOWN) > 20 and not read - set(settings.HONOURED) - set(settings.IRRELEVANT) - set(settings.REFUSED)
    check_scheduler_settings(type(KNOWN[name]), dict(KNOWN[name].config))


@pytest.mark.parametrize("name", KNOWN)
def test_a_limit_is_one_that_the_schedulers_own_step_applies(name):
    cls, source = type(KNOWN[name]), inspect.getsource(type(KNOWN[name]))
    read = inspect.signature(cls.__init__).parameters
    clips = "if self.config.clip_sample:" in source
    assert (limit_of(cls(clip_sample=True)) == Clip(1.0) if "clip_sample" in read else False) == clips
    if "thresholding" in read:
        assert ("if self.config.thresholding:" in source) == isinstance(limit_of(cls(thresholding=True)), Threshold)


def test_a_setting_that_the_class_does_not_read_is_ignored_as_diffusers_ignores_it():
    made = diffusers.PNDMScheduler.from_config({"clip_sample": True, "thresholding": True})
    assert limit_of(made) is None


@pytest.mark.parametrize(
    ("cls", "config", "says"),
    [
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr: true cannot go with prediction_type 'epsilon'",
        ),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: true cannot go"),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
            "use_flow_sigmas: true cannot go with",
        ),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "needs use_flow_sigmas: true"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas: True .* known: false"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            "timestep_type: 'continuous' .* known: \"discrete\"",
        ),
        ("LCMScheduler", {}, "LCMScheduler: cannot be a teacher's: its network is already distilled"),
    ],
)
def test_what_would_mean_something_else_is_refused_by_name(cls, config, says):
    cls = getattr(diffusers, cls)
    with pytest.raises(ValueError, match=says):
        check_scheduler_settings(cls, {**dict(cls().config), **config})


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_with_what_still_says_something_is_allowed(kind):
    made = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=kind)
    check_scheduler_settings(type(made), dict(made.config))
    assert clock_of(made)[0].t_max > 1 - 1e-6


def test_betas_without_any_signal_left_are_refused_for_epsilon():
    with pytest.raises(ValueError, match="trained_betas"):
        clock_of(diffusers.DDIMScheduler(trained_betas=[0.1, 0.5, 1.0]))


def test_a_setting_of_a_later_diffusers_is_refused_unless_it_has_its_default():
    class LaterScheduler:
        def __init__(self, beta_start=0.1, new_meaning=0.0): ...

    check_scheduler_settings(LaterScheduler, {"new_meaning": 0.0, "not_read": 3})
    with pytest.raises(ValueError, match="LaterScheduler: new_meaning: 0.5 is not known"):
        check_scheduler_settings(LaterScheduler, {"new_meaning": 0.5})


def test_a_flow_schedule_keeps_its_kind_of_prediction():
    """A solver with use_flow_sigmas and prediction_type epsilon predicts noise on a flow's clock."""
    made = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    assert clock_of(made)[1] == "epsilon"
    assert (
        clock_of(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))[1]
        == "linear_velocity"
    )


NETWORKS = [
    ("UNet2DModel", {"class_embed_type": "identity"}, "class_embed_type: 'identity'"),
    ("UNet2DModel", {"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier'"),
    ("UNet2DConditionModel", {"num_class_embeds": 1000}, "num_class_embeds: 1000"),
    ("UNet2DConditionModel", {"addition_embed_type": "image"}, "addition_embed_type: 'image'"),
    ("UNet2DConditionModel", {"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256"),
    ("UNet2DConditionModel", {"in_channels": 9}, "in_channels: 9: it denoises 9 channels, the card's shape says 4"),
    ("UNet2DConditionModel", {"in_channels": 4, "out_channels": 5}, "out_channels: 5 is neither 4 nor twice that"),
    ("PixArtTransformer2DModel", {"sample_size": 128}, "use_additional_conditions: True"),
    ("SanaTransformer2DModel", {"guidance_embeds": True}, "guidance_embeds: True"),
    ("FluxTransformer2DModel", {"in_channels": 384}, "it denoises 96 channels"),
    ("HunyuanImageTransformer2DModel", {"use_meanflow": True}, "use_meanflow: True .* reads an arrival time"),
    ("ZImageTransformer2DModel", {"siglip_feat_dim": 1152}, "siglip_feat_dim: 1152 cannot be a teacher's: it reads p"),
    ("ZImageTransformer2DModel", {"all_f_patch_size": [1, 2]}, "all_f_patch_size: .* it denoises videos; known: .1."),
]


@pytest.mark.parametrize(("network", "values", "says"), NETWORKS)
def test_a_network_that_reads_what_nothing_gives_it_is_refused_by_name(network, values, says):
    with pytest.raises(ValueError, match=says):
        check_network_settings(network, json.dumps(values), (4, 8, 8))


def test_every_tiny_network_of_every_family_passes():
    for make in (
        tiny_nets.dit,
        tiny_nets.sd,
        tiny_nets.sdxl,
        tiny_nets.sd3,
        tiny_nets.flux,
        tiny_nets.sana,
        tiny_nets.pixart,
        tiny_nets.qwen,
        tiny_nets.z_image,
        tiny_nets.flux2,
        tiny_nets.hunyuan_image,
        tiny_nets.lumina2,
        tiny_nets.aura_flow,
    ):
        net = make()
        check_network_settings(type(net).__name__, json.dumps(dict(net.config), default=str), (4, 8, 8))


PIPELINES = (
    "DDPMPipeline DDIMPipeline DiTPipeline StableDiffusionPipeline StableDiffusionXLPipeline "
    "StableDiffusion3Pipeline FluxPipeline "
    "SanaPipeline PixArtAlphaPipeline PixArtSigmaPipeline QwenImagePipeline StableDiffusionXLImg2ImgPipeline "
    "ZImagePipeline Flux2Pipeline Flux2KleinPipeline HunyuanImagePipeline Lumina2Pipeline AuraFlowPipeline"
).split()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_setting_of_a_pipeline_is_known(name):
    plain = (bool, int, float, str, dict)
    read = inspect.signature(getattr(diffusers, name).__init__).parameters.items()
    scalars = {
        key
        for key, parameter in read
        if isinstance(parameter.default, plain) and parameter.default is not parameter.empty
    }
    known = (*settings.PIPELINE_HONOURED, *settings.PIPELINE_IRRELEVANT, *settings.PIPELINE_REFUSED)
    assert not scalars - set(known)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"requires_aesthetics_score": True}, "requires_aesthetics_score: cannot be a teacher's"),
        ({"transformer_2": ["diffusers", "X"]}, "transformer_2: cannot be"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, "is_distilled: .* already distilled in steps"),
        (
            {"_class_name": "ZImageOmniPipeline"},
            "ZImageOmniPipeline: cannot be a teacher's: its network reads pictures",
        ),
        ({"boundary_ratio": 0.875}, "boundary_ratio: 0.875 is not known"),
    ],
)
def test_a_pipeline_that_is_more_than_its_network_is_refused_by_name(index, says):
    with pytest.raises(ValueError, match=says):
        check_pipeline_settings(index)
    check_pipeline_settings(
        {
            "_class_name": "X",
            "transformer_2": [None, None],
            "boundary_ratio": None,
            "force_zeros_for_empty_prompt": True,
        }
    )


def pipeline(folder, **scheduler):
    torch.manual_seed(0)
    diffusers.DDPMPipeline(with_random_weights(unet()), diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def test_zero_terminal_snr_is_refused_on_loading_and_beforehand(tmp_path):
    folder = pipeline(tmp_path / "pipe", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr: true") as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)
    spec = DiffusersModel("UNet2DModel", "{}", "DDPMScheduler", json.dumps({"rescale_betas_zero_snr": True}))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        spec.check_teacher()


STEM = "diffusion_pytorch_model"


def half(folder):
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")


def sharded_without_one(folder):
    net = diffusers.UNet2DModel.from_pretrained(folder)
    (folder / f"{STEM}.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / f"{STEM}-00002-of-{len(list(folder.glob('*.safetensors'))):05d}.safetensors").unlink()


def torn(folder):
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            half,
            f"{STEM}.fp16.safetensors is of the variant 'fp16', which is not read: save it as {STEM}.safetensors too",
        ),
        (sharded_without_one, f"{STEM}-00002-of-"),
        (torn, f"{STEM}.safetensors: is not a whole safetensors file"),
    ],
)
def test_weight_files_that_cannot_be_read_are_named_without_reading_them(tmp_path, spoil, says):
    folder = pipeline(tmp_path / "pipe") / "unet"
    check_weight_files(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=says) as caught:
        check_weight_files(folder)
    assert "\n" not in str(caught.value)


def test_the_page_has_a_row_for_every_setting():
    text = DOCS.read_text(encoding="utf-8")
    tables = (
        settings.HONOURED,
        settings.IRRELEVANT,
        settings.REFUSED,
        settings.PIPELINE_HONOURED,
        settings.PIPELINE_REFUSED,
        *settings.REFUSED_OF_NETWORKS.values(),
        settings.REFUSED_SCHEDULERS,
        settings.PIPELINE_IRRELEVANT,
    )
    assert not [key for table in tables for key in table if f"`{key}`" not in text]
