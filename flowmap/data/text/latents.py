"""Latents of sentences, made once by a frozen text autoencoder and stored under a hash of their inputs."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.data.text.tokens import Tokens


class TextCoder(Protocol):
    """The settings of a frozen text autoencoder.

    load() returns encode(list[str]) -> normalised latents (N, *shape), and decode(z) -> list[str].
    """

    @property
    def source(self) -> str | None: ...

    def load(self) -> Any: ...

    def identity(self) -> dict[str, Any]: ...


@runtime_checkable
class WithTokenizer(Protocol):
    """The settings of a text autoencoder whose tokenizer can be loaded alone."""

    def load_tokens(self) -> Tokens: ...


class Latent:
    """latent(texts): (N, *shape) float32, read from the folder if it has them whole, otherwise computed and written
    there.
    """

    def __init__(self, autoencoder: TextCoder, counts: Counter, *, root: str):
        self.autoencoder, self.counts, self.root = autoencoder, counts, root

    def __call__(self, texts: list[str]) -> Tensor:
        path = self.path(texts) if self.root else None
        made = None if path is None else _read(path)
        if made is None:
            made = self._made(texts)
            if path is not None:
                _write(path, made)
        self.counts["cut"] += int(made["cut"])
        return made["latents"].float()

    def path(self, texts: list[str]) -> Path:
        digest = hashlib.sha256(repr(sorted(self._identity.items())).encode())
        for text in texts:
            digest.update(text.encode() + b"\n")
        return Path(self.root) / f"{digest.hexdigest()[:16]}.safetensors"

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return self.autoencoder.identity()

    @cached_property
    def _coder(self) -> Any:
        coder = self.autoencoder.load()
        return coder.to("cuda") if torch.cuda.is_available() else coder

    def _made(self, texts: list[str]) -> dict[str, Tensor]:
        z, cut = self._coder.encode(texts, count_cut=True)
        return {"latents": z.half().cpu().contiguous(), "cut": torch.tensor([cut])}


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is kept there; None where nothing is, or it is torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
