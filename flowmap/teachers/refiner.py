"""A refiner: a diffusers image-to-image pipeline that adds noise to a finished image and denoises it again.

Source: Liu et al. 2023, arXiv:2309.06380, which refines one-step images of InstaFlow by SDXL-Refiner.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmap.teachers.autoencoder import before_loading, first_line

BATCH = 4
LIBRARIES = (None, "diffusers", "transformers")


@dataclass(frozen=True)
class Refiner:
    """Settings of the refiner. source: a pipeline's folder or hub id.

    strength: the noise level in (0, 1], and the share of `steps` that is run. guidance: the pipeline's guidance scale.
    prompt: for students without text.
    """

    source: str
    revision: str | None = None
    strength: float = 0.3
    steps: int = 25
    guidance: float = 5.0
    prompt: str = ""
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"--refiner-strength: {self.strength} must be above 0, and 1 at most")
        if int(self.steps * self.strength) < 1:
            raise ValueError(f"--refiner-strength: {self.strength} of {self.steps} steps is not one step")

    def load(self) -> FrozenRefiner:
        """The pipeline, from safetensors and without custom code. One-line ValueError if it cannot be loaded."""
        import diffusers

        try:
            index = diffusers.DiffusionPipeline.load_config(self.source, revision=self.revision)
            check_libraries(index)
            off = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
            before_loading()
            loader = diffusers.AutoPipelineForImage2Image
            pipeline = loader.from_pretrained(self.source, revision=self.revision, use_safetensors=True, **off)
        except Exception as error:  # diffusers raises various types for invalid folders
            what = f"is no image-to-image pipeline of diffusers': {first_line(error)}"
            raise ValueError(f"--refiner: {self.source!r} {what}") from error
        pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
        return FrozenRefiner(pipeline, self)


def check_libraries(index: dict[str, Any]) -> None:
    """Raise a ValueError if a part of the pipeline is of another library: custom code is never run."""
    for name, part in index.items():
        if isinstance(part, (list, tuple)) and len(part) == 2 and isinstance(part[1], str) and part[0] not in LIBRARIES:
            what = "is no class of diffusers or transformers; code of a pipeline's own is not run"
            raise ValueError(f"{name}: {part[1]} of {part[0]!r} {what}")


class FrozenRefiner:
    """A loaded refiner: refiner(pictures, prompts) maps images (B, 1 or 3, H, W) in [-1, 1] to (B, 3, H', W').

    The pipeline defines the output size. The same images, prompts and seed give the same result; image i uses a
    generator seeded with seed + i.
    """

    def __init__(self, pipeline: Any, spec: Refiner):
        self.pipeline, self.spec = pipeline, spec

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise ValueError(f"--refiner: refines pictures (B, 1 or 3, H, W), got {tuple(pictures.shape)}")
        prompts = [self.spec.prompt] * len(pictures) if prompts is None else list(prompts)
        if len(prompts) != len(pictures):
            raise ValueError(f"prompts: {len(prompts)} given for {len(pictures)} pictures")
        given = (pictures.float().clamp(-1, 1).expand(-1, 3, -1, -1) + 1) / 2
        generators = [torch.Generator().manual_seed(self.spec.seed + i) for i in range(len(given))]
        options = dict(
            output_type="pt",
            strength=self.spec.strength,
            num_inference_steps=self.spec.steps,
            guidance_scale=self.spec.guidance,
        )
        refined = []
        for i in range(0, len(given), BATCH):
            rows = slice(i, i + BATCH)
            out = self.pipeline(
                prompt=prompts[rows], image=given[rows].to(self.pipeline.device), generator=generators[rows], **options
            )
            refined.append(2 * out.images.float() - 1)
        return torch.cat(refined).to(pictures.device)

    def to(self, device) -> FrozenRefiner:
        self.pipeline.to(device)
        return self
