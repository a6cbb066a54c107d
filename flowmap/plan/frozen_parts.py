"""Check that the weights of the frozen networks that encode a data set can be read, before anything is encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmap.nets.weight_files import check_weight_files
from flowmap.teachers.autoencoder import Autoencoder
from flowmap.teachers.text import PipelineText, Sentence


def check_frozen_parts(spec: Any) -> None:
    """Raise ValueError, naming the file, if a local autoencoder or text encoder of that data lacks weights."""
    for key, source, folder in _folders(spec):
        try:
            check_weight_files(folder)
        except ValueError as error:
            raise ValueError(f"{key}: {source!r}: cannot be loaded: {error}") from error


def _folders(spec: Any) -> Iterator[tuple[str, str, Path]]:
    """Yield (key, source, folder of weights) of every part that is in a local folder."""
    autoencoder, text = spec.autoencoder, spec.text
    if isinstance(autoencoder, Autoencoder) and autoencoder.source and Path(autoencoder.source).is_dir():
        root = Path(autoencoder.source)
        folder = root if (root / "config.json").is_file() else root / "vae"
        if (folder / "config.json").is_file():  # Otherwise it is not an autoencoder, and loading it fails.
            yield "autoencoder.source", autoencoder.source, folder
    if isinstance(text, Sentence | PipelineText) and Path(text.source).is_dir():
        root = Path(text.source)
        for folder in [root] if isinstance(text, Sentence) else _text_encoders(root):
            if (folder / "config.json").is_file():
                yield "text.source", text.source, folder


def _text_encoders(root: Path) -> list[Path]:
    """Return the folders of the text encoders that a pipeline's index names."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    named = index.items() if isinstance(index, dict) else ()
    return [root / key for key, part in named if key.startswith("text_encoder") and isinstance(part, list) and part[0]]
