"""The student as a user has it: a flow map with its sampler and the decoder of its samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.ranges import MAX_STEPS
from flowmap.flow.draws import Generator, of_samples
from flowmap.flow.prior import LearnedPrior, Start, conditioning_rows, start_blocks, starts
from flowmap.flow.reward import Reward
from flowmap.flow.types import Cond
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import merged
from flowmap.samplers import Tilted, asked_for
from flowmap.student.compiled import compiled, compiler_needed
from flowmap.student.conditions import (
    NO_NEGATIVE,
    codes_of,
    intervals_of,
    labels_of,
    no_scale,
    prompts_of,
    rows_of,
    texts_of,
)
from flowmap.student.config import ImageLatents, StudentConfig, TextLatents, in_student_folder
from flowmap.student.hub import OnHub
from flowmap.student.prior import PRIOR, load_prior
from flowmap.student.quantized import Quantizable
from flowmap.student.text import Sentences, described_by
from flowmap.teachers.autoencoder import Autoencoder as DiffusersAutoencoder
from flowmap.teachers.autoencoder import FrozenAutoencoder

ENCODED = ("text", "text_mask", "pooled", "size")  # what text encoders give
Refine = Callable[[Tensor, Sequence[str] | None], Tensor]
MAX_IMAGES = 1_000_000
DECODED = 32  # latents that are decoded at once: a picture takes far more memory there than when it is drawn


class Student(Sentences, OnHub, Quantizable):
    """A flow map that samples: student(x, t, s, cond) is the map, student.sample(num, steps=...) draws samples."""

    def __init__(self, config: StudentConfig, flow_map: FlowMapNet, folder: Path | None = None):
        self.config, self.flow_map, self.folder = config, flow_map, folder

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Any] | None = None) -> Tensor:
        """f(x, t, s): x (B, ...), t and s (B,); cond has the keys of sample's, None where unconditional."""
        return self.flow_map(x, t, s, self.conditions(len(x), cond) if cond else None)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Any] | None = None) -> Tensor:
        return self.flow_map.mean_velocity(x, t, s, self.conditions(len(x), cond) if cond else None)

    def velocity(self, x: Tensor, t: Tensor, cond: Mapping[str, Any] | None = None) -> Tensor:
        return self.mean_velocity(x, t, t, cond)

    def to(self, device: torch.device | str) -> Student:
        self.flow_map.to(device)
        return self

    def parameters(self):
        return self.flow_map.parameters()

    def merged(self) -> Student:
        """The same map to rounding, with its adapters merged into weights of its own; the student itself if it has
        none. Raises ValueError if its base is quantised.
        """
        if self.config.lora is None:
            return self
        self.check_whole()
        flow_map = FlowMapNet(merged(self.flow_map.net)).eval().requires_grad_(False)
        return Student(replace(self.config, lora=None, base=None), flow_map, self.folder)

    @cached_property
    def _compiled(self) -> FlowMapNet:
        """The flow map with its network compiled; nothing is compiled before its first call."""
        return compiled(self.flow_map)

    @property
    def device(self) -> torch.device:
        return next(self.flow_map.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        num: int,
        steps: int = 1,
        cond: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        seed: int = 0,
        gamma: float | None = None,
        batch_size: int = 256,
        progress=None,
        latents: bool = False,
        refine: Refine | None = None,
        solver: str | None = None,
        compile: bool = False,
        reward: Tilted | Reward | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor | list[str]:
        """(num, *shape): pictures in [-1, 1], or num sentences. Raises ValueError that names what is wrong.

        With the same seed sample i has the same noise (gamma's too, and without cond the same class), whatever num,
        batch_size and the device are.

        cond        {"class": one label or num labels, numbers or names}, by default each class in turn; {"prompt": one
                    text or num texts} for students that are conditioned on text
        guidance    the scale, where it is an input
        gamma       in [0, 1], the noise added between steps; where `flowmap tune` found settings for that number of
                    steps, these are the defaults of guidance, gamma and the grid
        progress    a function, called with the number of new samples
        latents     return latents, not their pictures
        refine      a function of the pictures and their prompts (None without text) that returns refined pictures
                    (teachers/refiner.py)
        solver      the solver of the velocity F(x, t, t) that replaces the student's own sampler
        compile     call the network compiled by torch.compile: the first call takes seconds to minutes, later ones are
                    faster; the samples are the same to rounding. ValueError if nothing can compile it here
        reward      a function (pictures, conditions) -> (B,), or a Tilted (samplers/tilted.py) with its settings, by
                    whose reward the samples are chosen; on the student's own grid
        guidance_interval    the times (low, high) in which guidance acts, where they are an input
        """
        if guidance_interval is not None:
            cond = {**(cond or {}), "guidance_interval": guidance_interval}
        self._check_call(num, steps, seed, refines=refine is not None, latents=latents)
        generator = torch.Generator().manual_seed(seed)
        if guidance is None and solver is None and "guidance" not in (cond or {}):
            guidance = self.config.scale_at(steps)
        rows = self.conditions(num, cond, guidance, batch_size)
        noise = generator.clone_state()
        start = self.start(num, generator, rows.pop("z", None))
        options = dict(gamma=gamma, solver=solver, batch_size=batch_size, progress=progress, latents=latents)
        options["reward"] = reward
        found = self.carry(start, rows, steps, noise, compile=compile, **options)
        if refine is None:
            return found
        assert isinstance(found, Tensor)  # pictures: sentences were refused
        return refine(found, prompts_of(num, cond)).clamp(-1, 1)

    def _check_call(self, num: int, steps: int, seed: int, *, refines: bool, latents: bool) -> None:
        """Raise ValueError for arguments of `sample` outside their ranges, or that exclude one another."""
        if not 1 <= num <= MAX_IMAGES:
            raise ValueError(f"num: {num} must lie in 1..{MAX_IMAGES}")
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps: {steps} must lie in 1..{MAX_STEPS}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: {seed} must lie in -2^63..2^63-1")
        if self.config.edits:
            source, target = self.config.edits
            raise ValueError(f"num: this student carries sentences of {source} to {target}; use edit(texts)")
        if refines and (latents or isinstance(self.config.samples, TextLatents)):
            raise ValueError("latents: a refiner needs pictures; choose one of the two")

    @torch.no_grad()
    def carry(
        self,
        start: Start,
        conditions: Cond,
        steps: int,
        generator: Generator,
        *,
        gamma: float | None = None,
        solver: str | None = None,
        batch_size: int = 256,
        progress=None,
        latents: bool = False,
        compile: bool = False,
        reward: Tilted | Reward | None = None,
    ) -> Tensor | list[str]:
        """Samples from the given start (N, *shape), which is noise, a draw of a learned prior, or latents.

        conditions: the tensors of `conditions`. generator: the draws for sample i are a function of its state and of i.
        The other arguments are those of `sample`.
        """
        for name, given in (("gamma", gamma), ("reward", reward)):
            if given is not None and self.config.prior is not None:
                raise ValueError(f"{name}: adds noise from N(0, I), and this student starts from a learned prior")
        own = self.config.sampler_at(steps) if solver is None else self.config.sampler
        sampler = asked_for(own, gamma=gamma, solver=solver, reward=reward)
        noise = of_samples(generator, torch.arange(len(start.x1))) if sampler.draws else None
        flow_map, out = self._compiled if compile else self.flow_map, []
        if isinstance(sampler, Tilted):
            batch_size = max(1, batch_size // sampler.particles)
            flow_map.decode = self._decode_with_grad
        device = self.device
        for i in range(0, len(start.x1), batch_size):
            at = slice(i, i + batch_size)
            rows = {key: value[at] for key, value in conditions.items()} | conditioning_rows(start, at, device)
            chunk = start.x1[at].to(device)
            draws = None if noise is None else noise.at(at)
            with compiler_needed() if compile else nullcontext():
                out.append(sampler(flow_map, chunk, rows, steps=steps, generator=draws))
            if progress is not None:
                progress(len(chunk))
        x0 = out[0] if len(out) == 1 else torch.cat(out)
        if latents:
            return x0
        return (
            self.sentences(x0)
            if isinstance(self.config.samples, TextLatents)
            else self.pictures(x0, min(batch_size, DECODED))
        )

    def start(self, num: int, generator: torch.Generator, z: Tensor | None = None) -> Start:
        """The starts of `num` samples, on the CPU: a function of the generator's seed, and of the codes z (num, Z) if
        given.
        """
        prior = None if self.prior is None else self.prior.to(self.device)
        return starts(prior, tuple(self.config.shape), num, generator, z=z)

    def start_blocks(self, num: int, generator: torch.Generator) -> Iterator[Start]:
        """The same starts, block by block."""
        prior = None if self.prior is None else self.prior.to(self.device)
        return start_blocks(prior, tuple(self.config.shape), num, generator)

    @cached_property
    def prior(self) -> LearnedPrior | None:
        """The learned prior, loaded on first use; None where samples start from N(0, I)."""
        conditioning = self.config.prior
        if conditioning is None:
            return None
        assert self.folder is not None
        return load_prior(
            self.folder / PRIOR,
            scale=conditioning.scale,
            conditioning=conditioning.conditioning,
            size=conditioning.size,
        )

    @torch.no_grad()
    def pictures(self, x0: Tensor, batch_size: int = DECODED) -> Tensor:
        """Samples x0 (B, *shape) as pictures: decoded where they are latents, clamped to [-1, 1]; other values
        unchanged.
        """
        if isinstance(self.config.samples, ImageLatents):
            assert self.autoencoder is not None
            decode = self.autoencoder.to(x0.device).decode
            return torch.cat([decode(part).clamp(-1, 1) for part in x0.split(batch_size)]) if len(x0) else x0
        return x0.clamp(-1, 1) if self.config.clamp else x0

    @cached_property
    def autoencoder(self) -> FrozenAutoencoder | None:
        """The frozen autoencoder that decodes latents to pictures, loaded on first use; None without one."""
        spec = in_student_folder(self.config.autoencoder, self.folder)
        if isinstance(spec, DiffusersAutoencoder):
            spec.check_channels(self.config.shape[0])
        return None if spec is None else spec.load()

    @property
    def _decode_with_grad(self) -> Callable[[Tensor], Tensor] | None:
        """The decoder of latents to pictures, for rewards; None where samples need none."""
        if isinstance(self.config.samples, TextLatents):
            raise ValueError("reward: this student's samples are sentences, and rewards are of pictures")
        return None if self.autoencoder is None else self.autoencoder.to(self.device).decode_with_grad

    @cached_property
    def text(self):
        """The frozen text encoder, list[str] -> conditions, loaded on first use; None for a student without text."""
        return None if self.config.text is None else self.config.text.load()

    def conditions(
        self, num: int, cond: Mapping[str, Any] | None = None, guidance: float | None = None, batch_size: int = 256
    ) -> dict[str, Tensor]:
        """The user's conditions as tensors of `num` rows, checked. By default each class in turn, and the default
        scale. batch_size: the texts that are encoded at once.
        """
        cond = dict(cond or {})
        self._check_conditions(cond, guidance)
        rows = {} if self.config.text is None else self._text(num, cond, batch_size)
        if self.config.descriptions:
            rows |= described_by(self, num, cond)
        if "z" in cond and self.config.prior is not None:
            rows["z"] = codes_of(cond["z"], num, self.config.prior.size).to(self.device)
        if self.config.num_classes:
            rows["class"] = self._classes(num, cond.get("class"), self.config.num_classes)
        if self.config.guidance is not None:
            scale = guidance if guidance is not None else cond.get("guidance", self.config.guidance[2])
            rows["guidance"] = self._scales(num, scale, self.config.guidance)
        if (widest := self.config.guidance_interval) is not None:
            rows["guidance_interval"] = intervals_of(cond.get("guidance_interval"), num, widest).to(self.device)
        return rows

    def _check_conditions(self, cond: Mapping[str, Any], guidance: float | None) -> None:
        """Raise ValueError for a condition that the student does not take, or a scale where the scale is no input."""
        if not cond and guidance is None:
            return
        text = ("prompt", *ENCODED) if self.config.text is not None else ()
        numbers = ("guidance", "guidance_interval")
        has = (("class", self.config.num_classes), ("z", self.config.prior))
        has += tuple((name, getattr(self.config, name)) for name in numbers)
        allowed = [*(key for key, there in has if there), *text, *self.config.descriptions]
        if "negative_prompt" in cond:
            raise ValueError(f"negative_prompt: {cond['negative_prompt']!r} was given, but {NO_NEGATIVE}")
        if self.config.guidance is None and (scale := cond.get("guidance", guidance)) is not None:
            raise ValueError(f"guidance: {scale} was given, but {no_scale(self.config.baked_guidance)}")
        for key in cond:
            if key not in allowed:
                listed = ", ".join(allowed) or "none"
                raise ValueError(f"cond: {key!r} is no condition of this student; allowed: {listed}")

    def _scales(self, num: int, scale: Any, trained: tuple[float, float, float]) -> Tensor:
        """The guidance scales as (num,) float32; one outside the range that the student was trained on is a warning."""
        low, high, _ = trained
        scales = rows_of(scale, num, "guidance", torch.float32).to(self.device)
        if not bool(((scales >= 0) & scales.isfinite()).all()):
            raise ValueError(f"guidance: {scale} must be 0 or more (trained on {low:g}..{high:g})")
        if not bool(((scales >= low - 1e-6) & (scales <= high + 1e-6)).all()):
            what = f"guidance: {scale} is outside {low:g}..{high:g}, the scales that this student was trained on"
            warnings.warn(what, stacklevel=4)
        return scales

    def taken(self, num: int, cond: Mapping[str, Any], guidance: float | None = None) -> dict[str, Tensor]:
        """Those of the data's conditions that this student takes, as tensors of `num` rows."""
        known = (
            *(ENCODED if self.config.text is not None else ()),
            *(("class",) if self.config.num_classes else ()),
            *self.config.descriptions,
        )
        return self.conditions(num, {key: value for key, value in cond.items() if key in known}, guidance)

    def _text(self, num: int, cond: Mapping[str, Any], batch_size: int) -> dict[str, Tensor]:
        """The text conditions: prompts are encoded here, unless the caller has encoded them."""
        encoded = {key: cond[key].to(self.device) for key in ENCODED if key in cond}
        if encoded:
            if "prompt" in cond or any(len(value) != num for value in encoded.values()):
                raise ValueError(f"cond: {', '.join(encoded)} must have {num} rows, and come without prompt")
            return encoded
        prompt = cond.get("prompt")
        if prompt is None:
            raise ValueError("prompt: is required: this student is conditioned on text")
        prompts = texts_of(prompt, num, "prompt")
        place = {one: i for i, one in enumerate(dict.fromkeys(prompts))}
        places = torch.tensor([place[one] for one in prompts], device=self.device)
        self.text.to(self.device)
        texts = list(place)
        parts = [self.text(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        return {key: torch.cat([part[key].to(self.device) for part in parts])[places] for key in parts[0]}

    def _classes(self, num: int, label: Any, count: int) -> Tensor:
        if label is None:
            in_turn = torch.arange(num)
            return (in_turn if num <= count else in_turn % count).to(self.device)
        labels = rows_of(labels_of(label, self.config.class_names), num, "class", torch.int64)
        if int(labels.min()) < -1 or int(labels.max()) >= count:
            bad = labels[(labels < -1) | (labels >= count)][0].item()
            raise ValueError(f"class: {bad} is not one of 0..{count - 1} (or -1 for no class)")
        return labels.to(self.device)
