"""Converts a diffusers pipeline with pickled weights (.bin) to safetensors.

torch's restricted unpickler (weights_only=True) accepts only tensors and plain containers. Any other pickle is refused,
and none of its code runs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from flowmap.base.files import copy_folder, read_json, write_tensors

KEPT = (".json", ".txt", ".model", ".safetensors")


def convert_pipeline(folder: str | Path, out: str | Path) -> list[str]:
    """Convert the pipeline in `folder` and return the names of the parts that had pickles.

    The other files of the pipeline are copied. Raises a one-line ValueError if a part cannot be converted.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--from: {folder} is no diffusers pipeline (no model_index.json)")
    read_json(folder / "model_index.json")
    pickles = sorted(path for path in folder.glob("*/*.bin") if not (path.parent / _name(path)).is_file())
    for path in folder.glob("*/*.bin.index.json"):
        raise ValueError(f"{path}: its weights are in several pickles, which convert does not support")
    if not pickles:
        raise ValueError(
            f"--from: {folder} has no pickles (*.bin) without safetensors; name the folder itself in the card"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        temporary = Path(scratch) / out.name
        for path in pickles:
            # attention masks may contain -inf
            write_tensors(temporary / path.parent.name / _name(path), _tensors(path), finite=False)
        copy_folder(folder, temporary, wanted=lambda path: path.suffix in KEPT)
        os.replace(temporary, out)
    return [path.parent.name for path in pickles]


def _name(path: Path) -> str:
    """The file name that diffusers and transformers use for the safetensors form of this pickle."""
    return {"pytorch_model": "model"}.get(path.stem, path.stem) + ".safetensors"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; errors are reported below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make torch.load raise anything
        raise ValueError(
            f"{path}: holds more than tensors, or is torn: {' '.join(str(error).split())[:200]}; nothing was executed"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ValueError(f"{path}: is no mapping from names to tensors")
    return {name: tensor.clone() for name, tensor in loaded.items()}  # safetensors does not store shared memory
