"""A causal language model of transformers for measuring alone; its folder or hub id has the model and its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F


def check_source(source: str) -> None:
    """Raise ValueError unless it is a folder here or a hub id (owner/name, or a single name of the hub's own)."""
    if not Path(source).is_dir() and (source.startswith((".", "/")) or source.count("/") > 1 or not source.strip("?")):
        raise ValueError(f"metrics.source: {source!r}: no such folder, and no hub id (owner/name)")


class LanguageModel:
    """A language model with perplexity(texts).

    Raises ValueError if the source has no causal language model with a tokenizer, or no weights as safetensors.
    """

    def __init__(self, source: str, device: torch.device | str | None = None):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds of errors on a foreign folder
            raise ValueError(
                f"metrics.source: {source!r}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        self.end = next((i for i in ends if i is not None), None)
        if self.end is None:
            raise ValueError(f"metrics.source: {source!r}: its tokenizer has no token that ends a sentence")

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str], batch_size: int = 64) -> float:
        """exp of the mean negative log-likelihood of the texts' tokens and ends; infinite for no texts.

        Each text comes after an end token.
        """
        total, count = 0.0, 0
        for i in range(0, len(texts), batch_size):
            rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[i : i + batch_size]]
            rows = [[self.end, *row, self.end] for row in rows]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [self.end] * (longest - len(row)) for row in rows], device=self.device)
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
            logits = self.model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
            nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * real[:, 1:]
            total, count = total + float(nll.sum()), count + int(real[:, 1:].sum())
        return math.exp(total / count) if count else math.inf
