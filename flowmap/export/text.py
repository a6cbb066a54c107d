"""A student's text encoders in an export: copied for pipelines that call them, otherwise called by code in the card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowmap.base.files import copy_folder
from flowmap.export.plan import Export
from flowmap.teachers.autoencoder import local_folder
from flowmap.teachers.text import (
    PIPELINE,
    T5,
    WITHOUT_T5,
    PipelineText,
    Sentence,
    pipeline_index,
    text_width,
    zeros_for_empty,
)

PROMPT = "a blue cat"  # in the card's examples
KEPT = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")
PARTS = tuple(f"{kind}{number}" for number in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer"))


@dataclass(frozen=True)
class TextParts:
    """The text encoders of an exported folder, or of its base.

    index: their entries in model_index.json. pipeline: the class with the encode_prompt for them; None for a sentence
    encoder. zeros_for_empty: whether an empty prompt is encoded as zeros (SDXL). width: of the zeros that replace
    SD3's T5 if it is missing; otherwise None.
    """

    index: dict[str, list[str]]
    pipeline: str | None = None
    max_tokens: int | None = None
    size: int | None = None
    zeros_for_empty: bool = False
    width: int | None = None


def write_text_parts(
    plan: Export, folder: Path, *, for_pipeline: str | None = None, of_base: bool = False
) -> TextParts | None:
    """Write the student's text encoders and tokenizers to the folder. None if it has none, or none that can be used.

    for_pipeline: skip encoders of another pipeline class. of_base: do not write encoders that the LoRA student's base
    has.
    """
    spec = plan.student.config.text
    if spec is None or not plan.text:
        return None
    if isinstance(spec, Sentence):
        return _write_sentence(plan, folder)
    if not isinstance(spec, PipelineText):
        return None
    parts, source = _pipeline_parts(spec)
    if of_base:
        base = plan.student.config.frozen_base()
        same = (
            PipelineText(
                source=base.source, revision=base.revision, max_tokens=spec.max_tokens, size=spec.size
            ).identity()
            == spec.identity()
        )
        return parts if same else None
    if for_pipeline not in (None, parts.pipeline):
        return None
    for name in parts.index:
        _copy(source / name, folder / name)
    return parts


def _pipeline_parts(spec: PipelineText) -> tuple[TextParts, Path]:
    source = local_folder(spec.source, spec.revision, "text.source", PIPELINE)
    index = pipeline_index(source)
    there = {name: index[name] for name in PARTS if (index.get(name) or [None])[0]}
    width = text_width(source) if index["_class_name"] == WITHOUT_T5 and T5 not in there else None
    return TextParts(there, index["_class_name"], spec.max_tokens, spec.size, zeros_for_empty(index), width), source


def _write_sentence(plan: Export, folder: Path) -> TextParts:
    frozen = plan.student.text
    frozen.tokenizer.save_pretrained(folder / "tokenizer")
    frozen.model.save_pretrained(folder / "text_encoder")
    index = {
        "text_encoder": ["transformers", type(frozen.model).__name__],
        "tokenizer": ["transformers", type(frozen.tokenizer).__name__],
    }
    return TextParts(index, max_tokens=frozen.spec.max_tokens)


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a part, without variants in half precision and pickles."""
    copy_folder(source, target, lambda path: path.name.endswith(KEPT) and ".fp16." not in path.name)


def sentence_lines(parts: TextParts | None) -> list[str]:
    """The card's lines that encode prompts with transformers; none if the pipeline encodes prompts itself."""
    if parts is None or parts.pipeline is not None:
        return []
    return [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder/tokenizer")',
        'encoder = AutoModel.from_pretrained("path/to/this/folder/text_encoder").requires_grad_(False)',
        f'options = dict(padding="max_length", truncation=True, max_length={parts.max_tokens}, return_tensors="pt")',
        f'tokens = tokenizer(["{PROMPT}"], **options)',
        'prompt_attention_mask = prompt_embeds_mask = tokens["attention_mask"]',
        "prompt_embeds = encoder(**tokens).last_hidden_state * prompt_attention_mask.unsqueeze(-1)",
        "pooled_prompt_embeds = torch.nn.functional.normalize(prompt_embeds.sum(1), dim=-1)",
        "",
    ]
