"""The settings of a diffusers pipeline as a teacher: each is honoured, irrelevant to a velocity, or refused by name.

A setting that a scheduler's class does not read is ignored, as in diffusers. A setting in none of these tables (of a
later version of diffusers) is refused unless it has its default value. docs/guide/teachers.md shows the tables.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowmap.flow.clock import FlowClock, TableClock
from flowmap.flow.limit import Clip, Limit, Threshold

PREDICTION_OF = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "linear_velocity"}
FLOW_PREDICTIONS = ("epsilon", "sample", "flow_prediction")

HONOURED = {
    "num_train_timesteps": "the length of the table, or the unit of a flow's time",
    **dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale"), "the table"),
    "rescale_betas_zero_snr": (
        "the table; refused with prediction_type epsilon, which says nothing of the data where the signal is zero"
    ),
    "prediction_type": "what the network predicts; a missing one is the scheduler's default, as in diffusers",
    "use_flow_sigmas": "a flow's clock; refused with v_prediction",
    "clip_sample": "the predicted data of the (guided) teacher is clipped at +-clip_sample_range",
    "clip_sample_range": "see clip_sample",
    "thresholding": "the predicted data of the (guided) teacher is thresholded; takes precedence over clip_sample",
    "dynamic_thresholding_ratio": "see thresholding",
    "sample_max_value": "see thresholding",
}
_GRID = (
    "timestep_spacing steps_offset set_alpha_to_one final_sigmas_type euler_at_final use_karras_sigmas use_beta_sigmas "
    "use_exponential_sigmas use_lu_lambdas interpolation_type sigma_min sigma_max lambda_min_clipped shift flow_shift "
    "use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len shift_terminal time_shift_type"
).split()
_SOLVER = (
    "algorithm_type solver_order solver_type solver_p predict_x0 lower_order_final disable_corrector predictor_order "
    "corrector_order skip_prk_steps stochastic_sampling eta tau_func"
).split()
IRRELEVANT = {
    **dict.fromkeys(_GRID, "the sampler's grid; the solver here has its own"),
    **dict.fromkeys(_SOLVER, "the sampler's own rule"),
    "variance_type": (
        "the noise that a sampler adds; a learned variance (twice the channels) is left out of the prediction"
    ),
}
REFUSED = {
    "invert_sigmas": ((False,), "the network's time runs the other way"),
    "timestep_type": (("discrete",), "the network reads another time than the table's places"),
}
"""Setting -> (supported values, reason why others are not)."""
REFUSED_SCHEDULERS = {
    **dict.fromkeys(
        ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"),
        "its network is already distilled and gives no velocity",
    ),
    **dict.fromkeys(("HeliosScheduler", "HeliosDMDScheduler"), "its network denoises in stages of several resolutions"),
}
READS_NO_CLIP = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # they have clip_sample, but their step ignores it

REFUSED_OF_NETWORKS: dict[str, dict[str, tuple[tuple, str]]] = {
    "UNet2DModel": {
        "class_embed_type": ((None, "timestep"), "its classes are no labels"),
        "time_embedding_type": (("positional", "learned"), "it divides by its time, which is 0 at the data"),
    },
    "UNet2DConditionModel": {
        "class_embed_type": ((None,), "it reads a condition that no data gives"),
        "num_class_embeds": ((None,), "it reads a condition that no data gives"),
        "addition_embed_type": ((None, "text_time"), "it reads a condition that no data gives"),
        "encoder_hid_dim_type": ((None, "text_proj"), "it reads a condition that no data gives"),
        "time_cond_proj_dim": ((None,), "it is already distilled and reads a guidance scale"),
    },
    "PixArtTransformer2DModel": {
        "use_additional_conditions": ((None, False), "it reads resolutions and aspect ratios")
    },
    "SanaTransformer2DModel": {
        "guidance_embeds": ((None, False), "it is already distilled and reads a guidance scale")
    },
    "QwenImageTransformer2DModel": {
        "guidance_embeds": ((None, False), "it is already distilled and reads a guidance scale"),
        "zero_cond_t": ((None, False), "it edits pictures"),
        "use_additional_t_cond": ((None, False), "it reads a condition that no data gives"),
        "use_layer3d_rope": ((None, False), "it denoises layers"),
    },
    "HunyuanImageTransformer2DModel": {
        "guidance_embeds": ((None, False), "it is already distilled and reads a guidance scale"),
        "use_meanflow": ((None, False), "it is already distilled and reads an arrival time"),
        "patch_size": (([1, 1], [2, 2]), "it denoises videos"),
    },
    "Flux2Transformer2DModel": {"patch_size": ((1,), "its pipeline packs patches itself")},
    "ZImageTransformer2DModel": {
        "siglip_feat_dim": ((None,), "it reads pictures"),
        "all_patch_size": (([2],), "it reads patches of several sizes"),
        "all_f_patch_size": (([1],), "it denoises videos"),
    },
}
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")  # a token is a 2 x 2 patch of the latents

PIPELINE_HONOURED = ("force_zeros_for_empty_prompt", "id2label")
REFUSED_PIPELINES = {
    "Flux2KleinKVPipeline": "its network edits pictures and is already distilled",
    "Flux2KleinInpaintPipeline": "its network fills in pictures",
    "ZImageOmniPipeline": "its network reads pictures",
    "HunyuanImageRefinerPipeline": "its network refines pictures",
}
PIPELINE_IRRELEVANT = ("add_watermarker", "requires_safety_checker", "is_cosxl_edit")
PIPELINE_REFUSED = {
    "is_distilled": "the network is already distilled in steps and gives no velocity",
    "requires_aesthetics_score": "the network reads an aesthetic score",
    "transformer_2": "it has a second network for part of the times",
    "unet_2": "it has a second network for part of the times",
}


def check_scheduler_settings(cls: type, config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a scheduler setting with which we cannot convert predictions to velocities."""
    name = cls.__name__
    if name in REFUSED_SCHEDULERS:
        raise ValueError(f"scheduler {name}: cannot be a teacher's: {REFUSED_SCHEDULERS[name]}")
    read = inspect.signature(cls.__init__).parameters  # type: ignore[misc]  # only for its signature
    for key, value in config.items():
        if key in read and key not in HONOURED and key not in IRRELEVANT:
            _check_setting(name, key, value, read[key].default)
    zero_end = "rescale_betas_zero_snr" in read and bool(config.get("rescale_betas_zero_snr"))
    _check_prediction(name, config, zero_end=zero_end)


def _check_setting(name: str, key: str, value: Any, default: Any) -> None:
    """Raise a ValueError for a setting that we refuse, and for an unknown one that is not at its default."""
    if key in REFUSED:
        known, why = REFUSED[key]
        if value not in known:
            what = f"cannot be a teacher's: {why}; known: {_listed(known)}"
            raise ValueError(f"scheduler {name}: {key}: {value!r} {what}")
    elif value != default:
        what = "is not known, nor whether it changes what the network predicts"
        raise ValueError(f"scheduler {name}: {key}: {value!r} {what}")


def _check_prediction(name: str, config: Mapping[str, Any], *, zero_end: bool) -> None:
    kind, flows = config.get("prediction_type", "epsilon"), bool(config.get("use_flow_sigmas"))
    if zero_end and kind == "epsilon" and not flows:
        raise ValueError(
            f"scheduler {name}: rescale_betas_zero_snr: true cannot go with prediction_type 'epsilon': at the end of "
            "the schedule the state is pure noise, and the predicted noise says nothing of the data; known: "
            "v_prediction, sample"
        )
    if kind == "flow_prediction" and not flows:
        raise ValueError(f"scheduler {name}: prediction_type 'flow_prediction' needs use_flow_sigmas: true")
    if flows and kind not in FLOW_PREDICTIONS:
        known = ", ".join(FLOW_PREDICTIONS)
        raise ValueError(
            f"scheduler {name}: use_flow_sigmas: true cannot go with prediction_type {kind!r}; known: {known}"
        )


def clock_of(scheduler: Any) -> tuple[FlowClock | TableClock, str]:
    """The clock and the kind of prediction of a diffusers scheduler.

    Raises a ValueError for a scheduler that has neither a flow-matching nor a tabulated schedule.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("FlowMatch"):
        return FlowClock(float(config.get("num_train_timesteps", 1000))), "linear_velocity"
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(
            f"scheduler {name}: has no alphas_cumprod and is no flow-matching scheduler: its clock is not known"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_OF:
        raise ValueError(f"scheduler {name}: prediction_type {kind!r} is not one of {', '.join(PREDICTION_OF)}")
    if config.get("use_flow_sigmas") or kind == "flow_prediction":
        return FlowClock(float(config.get("num_train_timesteps", 1000))), PREDICTION_OF[kind]
    clock = TableClock(scheduler.alphas_cumprod)
    if kind == "epsilon" and float(scheduler.alphas_cumprod[-1]) == 0:
        raise ValueError(
            f"scheduler {name}: prediction_type 'epsilon' cannot go with betas (trained_betas, beta_end) that end "
            "without any signal"
        )
    return clock, PREDICTION_OF[kind]


def limit_of(scheduler: Any) -> Limit | None:
    """The thresholding or clipping of predicted data in the scheduler's step, if any."""
    config, name = scheduler.config, type(scheduler).__name__
    read = inspect.signature(type(scheduler).__init__).parameters
    if "thresholding" in read and config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return Threshold(float(ratio), float(most))
    if "clip_sample" in read and name not in READS_NO_CLIP and config.get("clip_sample"):
        return Clip(float(config.get("clip_sample_range", 1.0)))
    return None


def check_network_settings(network: str, settings: str, shape: tuple[int, ...] | None = None) -> None:
    """Raise a ValueError that names a setting of an unsupported network.

    Such a network reads conditions that no data provides, or denoises another number of channels than `shape` has.
    """
    found = json.loads(settings)
    for key, (known, why) in REFUSED_OF_NETWORKS.get(network, {}).items():
        value = found.get(key, known[0])
        if key == "use_additional_conditions" and value is None:
            value = found.get("sample_size") == 128  # PixArt's own default
        if value not in known:
            raise ValueError(f"{network}: {key}: {value!r} cannot be a teacher's: {why}; known: {_listed(known)}")
    inputs = found.get("in_channels")
    if shape is not None and isinstance(inputs, int):
        own = inputs // 4 if network in PACKED else inputs
        if own != shape[0]:
            what = f"it denoises {own} channels, the card's shape says {shape[0]}"
            raise ValueError(f"{network}: in_channels: {inputs}: {what}")
        outputs = found.get("out_channels")
        if network not in PACKED and isinstance(outputs, int) and outputs not in (own, 2 * own):
            what = f"is neither {own} nor twice that (with a learned variance)"
            raise ValueError(f"{network}: out_channels: {outputs} {what}")


def check_pipeline_settings(index: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a setting in model_index.json with which the network is not the whole teacher."""
    name = index.get("_class_name")
    if isinstance(name, str) and name in REFUSED_PIPELINES:
        raise ValueError(f"model_index.json: {name}: cannot be a teacher's: {REFUSED_PIPELINES[name]}")
    for key, value in index.items():
        parts = isinstance(value, (list, tuple))
        if key.startswith("_") or value in (None, False) or (parts and not any(value)):
            continue
        if key in PIPELINE_REFUSED:
            raise ValueError(f"model_index.json: {key}: cannot be a teacher's: {PIPELINE_REFUSED[key]}")
        if not parts and key not in (*PIPELINE_HONOURED, *PIPELINE_IRRELEVANT):
            what = "is not known, nor whether it changes what the network predicts"
            raise ValueError(f"model_index.json: {key}: {value!r} {what}")


def _listed(values: tuple) -> str:
    return ", ".join("null" if value is None else json.dumps(value) for value in values)
