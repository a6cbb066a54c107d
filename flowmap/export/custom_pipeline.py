"""A few-step pipeline for flow maps. pipeline.py in the exported folder contains its source and dependencies."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowmap.flow.draws import normal_like, normal_rows, of_samples
from flowmap.samplers.grids import FewStep
from flowmap.teachers.text import pipeline_rows, say_width, sentence_rows

TIME_UNIT = 1000
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


class FlowMapPipeline(DiffusionPipeline):
    """Sample images from noise in a few steps of a flow map.

    sampler: settings of the time grid, and gamma, the amount of noise added between steps. steps, guidance_scale: the
    defaults of a call. text: how to encode prompts: the diffusers pipeline with the encode_prompt for the text encoders
    (None: a sentence encoder), max_tokens, and the image size for SDXL. id2label: class names by number, as text.
    """

    _optional_components = ["vae", *TEXT_PARTS]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->flow_map->vae"

    def __init__(
        self,
        flow_map,
        scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        text: dict | None = None,
        sampler: dict | None = None,
        steps: int = 1,
        guidance_scale: float | None = None,
        clamp: bool = True,
        id2label: dict | None = None,
    ):
        super().__init__()
        encoders = (text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3)
        self.register_modules(
            flow_map=flow_map, scheduler=scheduler, vae=vae, **dict(zip(TEXT_PARTS, encoders, strict=True))
        )
        settings = dict(sampler=sampler or {}, steps=steps, guidance_scale=guidance_scale, clamp=clamp)
        self.register_to_config(text=text, id2label=id2label, **settings)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images: int | None = None,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        time_ids: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        gamma: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample one image per row of the conditions, or num_images images.

        Without class_labels, classes are used in turn; -1 is no class. latents: the initial noise, (B, *shape).
        output_type: "pil", "np" or "pt" in [0, 1], or "latent" for the network's output. Raises a ValueError for an
        unsupported condition.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: {output_type!r} is not one of pil, np, pt, latent")
        device = self._execution_device
        rows = dict(text=prompt_embeds, pooled=pooled_prompt_embeds, text_mask=prompt_attention_mask, size=time_ids)
        labels = None if class_labels is None else torch.as_tensor(self.get_label_ids(class_labels)).reshape(-1)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        lengths = [len(value) for value in (latents, *rows.values(), labels, prompts) if value is not None]
        num = max(lengths, default=1) if num_images is None else num_images
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        _check_counts(num_images=num, num_inference_steps=steps)
        if prompts is not None:
            rows |= self._encode(prompts * num if len(prompts) == 1 else prompts, num, device)
        cond = {key: value.to(device) for key, value in rows.items() if value is not None}
        cond |= self._classes(labels, num, device) | self._guidance(guidance_scale, num, device)
        noise = of_samples(generator, torch.arange(num)) if isinstance(generator, torch.Generator) else generator
        x = self._sample(self._start(latents, num, generator, device), cond, steps, gamma, noise)
        images = x if output_type == "latent" else self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, label: Any) -> Any:
        """Class numbers for a class name, or for a list with class names; anything else is returned unchanged.

        Raises a ValueError for an unknown name.
        """
        numbers = {name: int(i) for i, name in (self.config.id2label or {}).items()}
        given = [label] if isinstance(label, str) else label if isinstance(label, list) else []
        names = [one for one in given if isinstance(one, str)]
        for name in names:
            if name not in numbers:
                known = ", ".join(numbers) or "no names, give a number"
                raise ValueError(f"class_labels: no class {name!r}; there are: {known}")
        if isinstance(label, str):
            return numbers[label]
        return [numbers.get(one, one) for one in label] if names else label

    def _encode(self, prompts: list[str], num: int, device) -> dict[str, Tensor]:
        """The conditions of prompts; each distinct prompt is encoded once."""
        settings = self.config.text
        if settings is None:
            raise ValueError(
                "prompt: this folder has no text encoder; give prompt_embeds, or what else the network reads"
            )
        if len(prompts) != num:
            raise ValueError(f"prompt: {len(prompts)} given; allowed: one text, or {num} texts")
        distinct = list(dict.fromkeys(prompts))
        if settings["pipeline"] is None:
            rows = sentence_rows(self.tokenizer, self.text_encoder, distinct, settings["max_tokens"])
        else:
            encoder = self._stock_encoder(getattr(diffusers, settings["pipeline"]), settings)
            rows = pipeline_rows(encoder, distinct, device, settings["max_tokens"], settings["size"])
        places = torch.tensor([distinct.index(one) for one in prompts], device=device)
        return {key: value.to(device)[places] for key, value in rows.items()}

    def _stock_encoder(self, stock: type, settings: dict) -> DiffusionPipeline:
        """A pipeline of the class `stock` with the text encoders, without a network."""
        wanted = inspect.signature(stock.__init__).parameters  # type: ignore[misc]  # only for its signature
        required = (name for name, one in wanted.items() if name != "self" and one.default is one.empty)
        parts: dict[str, Any] = dict.fromkeys(required)
        parts |= {name: getattr(self, name) for name in (*TEXT_PARTS, "scheduler") if name in wanted}
        if "requires_safety_checker" in wanted:
            parts["requires_safety_checker"] = False
        if "force_zeros_for_empty_prompt" in wanted:
            parts["force_zeros_for_empty_prompt"] = settings["zeros_for_empty"]
        encoder = stock(**parts)
        if settings["width"] is not None:
            say_width(encoder, settings["width"])
        return encoder

    def _classes(self, labels: Tensor | None, num: int, device) -> dict[str, Tensor]:
        count = self.flow_map.config.num_classes
        if not count:
            if labels is not None:
                raise ValueError("class_labels: this student has no classes")
            return {}
        labels = torch.arange(num) % count if labels is None else labels.expand(num)
        if int(labels.min()) < -1 or int(labels.max()) >= count:
            raise ValueError(f"class_labels: must lie in 0..{count - 1} (or -1 for no class)")
        return {"class": labels.to(device)}

    def _guidance(self, scale: float | None, num: int, device) -> dict[str, Tensor]:
        if not self.flow_map.takes_guidance:
            if scale is not None:
                raise ValueError("guidance_scale: is no input of this student")
            return {}
        scale = self.config.guidance_scale if scale is None else scale
        return {} if scale is None else {"guidance": torch.full((num,), float(scale), device=device)}

    def _start(self, latents: Tensor | None, num: int, generator, device) -> Tensor:
        """The initial noise of `num` samples: the given one, or drawn from the generator."""
        shape = (num, *self.flow_map.config.shape)
        if latents is None:
            latents = _noise(shape, generator, device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: has shape {tuple(latents.shape)}, wants {shape}")
        return latents.to(device, torch.float32)

    def _sample(self, x1: Tensor, cond: dict[str, Tensor], steps: int, gamma: float | None, noise) -> Tensor:
        """x0 after `steps` network calls. With gamma > 0 each step goes further than s, then adds new noise (CTM)."""
        settings: dict[str, Any] = {key: value for key, value in self.config.sampler.items() if key != "gamma"}
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        grid = FewStep(**settings)
        times, x = grid.times(steps), grid.start(x1)
        gamma = self.config.sampler.get("gamma", 0.0) if gamma is None else gamma
        kept = math.sqrt(1 - gamma**2)
        self.scheduler.set_timesteps(sigmas=list(times[:-1]), device=x.device)
        ones = torch.ones(len(x), device=x.device)
        for t, s in self.progress_bar(list(zip(times, times[1:], strict=False))):
            ratio = 1 - (1 - kept) * s
            target = kept * s / ratio
            mean_velocity = self.flow_map(x, ones * t, ones * target, cond)
            x = ratio * self.scheduler.step(mean_velocity, TIME_UNIT * t, x, r_timestep=TIME_UNIT * target).prev_sample
            if s > 0 and gamma > 0:
                listed = isinstance(noise, list)
                fresh = randn_tensor(x.shape, noise, x.device, x.dtype) if listed else normal_like(x, noise)
                x = x + gamma * s * fresh
        return x

    def _finish(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            x = self._decode(x / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0))
        if x.ndim == 4 and (self.config.clamp or self.vae is not None):
            if output_type == "pil" and x.shape[1] not in (1, 3):
                what = f"samples of {x.shape[1]} channels are no pictures"
                raise ValueError(f"output_type: {what}; take pt, np or latent")
            return self.image_processor.postprocess(x, output_type=output_type)
        if output_type == "pil":
            raise ValueError("output_type: this student's samples are no pictures; take pt, np or latent")
        return x if output_type == "pt" else x.cpu().numpy()

    def _decode(self, z: Tensor) -> Tensor:
        """Decode to float32 images in the autoencoder's dtype, or in float32 if it is float16 and has force_upcast."""
        kind = self.vae.dtype
        upcast = kind == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        finally:
            if upcast:
                self.vae.to(dtype=kind)


def _check_counts(**counts: Any) -> None:
    """Raise a ValueError for a count that is not a whole number from 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} must be a whole number from 1")


def _noise(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, device) -> Tensor:
    """The initial noise. With one CPU generator, that of sample i does not depend on the number of samples."""
    if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        return normal_rows(shape, generator).to(device)
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
