"""A diffusers pipeline whose weights are pickles (.bin) becomes the same folder with safetensors.

torch's restricted reader admits tensors and plain containers alone; any other pickle is refused by name and nothing of it runs.
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
    """The parts whose weights were converted; all else that a pipeline is loaded from is copied. ValueError, in one line, for what cannot be."""
    folder, out = Path(folder), Path(out)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--from: {folder} is no diffusers pipeline (no model_index.json)")
    read_json(folder / "model_index.json")
    pickles = sorted(path for path in folder.glob("*/*.bin") if not (path.parent / _name(path)).is_file())
    for path in folder.glob("*/*.bin.index.json"):
        raise ValueError(f"{path}: its weights are in several pickles, which are not converted")
    if not pickles:
        raise ValueError(
            f"--from: {folder} holds no pickles (*.bin) that stand for safetensors; name the folder itself in the card"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        temporary = Path(scratch) / out.name
        for path in pickles:
            write_tensors(
                temporary / path.parent.name / _name(path), _tensors(path), finite=False
            )  # masks of others may hold -inf
        copy_folder(folder, temporary, wanted=lambda path: path.suffix in KEPT)
        os.replace(temporary, out)
    return [path.parent.name for path in pickles]


def _name(path: Path) -> str:
    """diffusers' and transformers' name of the safetensors file that holds what this pickle does."""
    return {"pytorch_model": "model"}.get(path.stem, path.stem) + ".safetensors"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: what it holds is said below
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes it raise anything at all
        raise ValueError(
            f"{path}: holds more than tensors, or is torn: {' '.join(str(error).split())[:200]}; nothing was executed"
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items()
    ):
        raise ValueError(f"{path}: is no mapping from names to tensors")
    return {name: tensor.clone() for name, tensor in held.items()}  # tied weights: safetensors wants each by itself
