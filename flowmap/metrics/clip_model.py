"""CLIP of transformers with its own preprocessing, and the mean score of pictures with captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.images import to_bytes
from flowmap.metrics.mean import MeanScore
from flowmap.metrics.picture_nets import in_colour, load_network
from flowmap.metrics.real import chunk_of


class CLIPMean(MeanScore):
    """100 times the mean over all pictures of the cosine of picture and caption, at least 0."""

    higher_is_better = True

    def __init__(self, source: str):
        super().__init__()
        from transformers import CLIPModel, CLIPProcessor

        self.model = load_network(CLIPModel, source, "clip_score", "CLIP").eval().requires_grad_(False)
        self.processor = load_network(CLIPProcessor, source, "clip_score", "tokenizer and preprocessing of CLIP")

    @torch.no_grad()
    def update(self, x: Tensor, captions: Sequence[str]) -> None:
        """Count pictures x (B, 1 or 3, H, W) in [-1, 1], each with its caption."""
        if len(x) != len(captions):
            raise ValueError(f"clip_score: {len(x)} pictures and {len(captions)} captions")
        size = chunk_of(x.shape[1:])
        for i in range(0, len(x), size):
            pictures, texts = self._pictures(x[i : i + size]), self._texts(list(captions[i : i + size]))
            self.total += F.cosine_similarity(pictures, texts).double().sum()
            self.count += len(pictures)

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 100]. Raises ValueError if no picture was given."""
        if not self.count:
            raise ValueError("metrics: clip_score was given no picture")
        return (100 * super().compute()).clamp(min=0)

    def _pictures(self, x: Tensor) -> Tensor:
        images = self.processor.image_processor(list(to_bytes(in_colour(x))), return_tensors="pt")
        found = self.model.vision_model(pixel_values=images["pixel_values"].to(x.device))
        return self.model.visual_projection(found.pooler_output)

    def _texts(self, captions: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        options = dict(padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = self.processor.tokenizer(captions, **options).to(self.device)
        found = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return self.model.text_projection(found.pooler_output)
