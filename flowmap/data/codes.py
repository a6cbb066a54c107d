"""Codes of an auxiliary model as data, to train a flow in z or to fit a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowmap.base.ranges import BelowOne, Range, Seed
from flowmap.data.dataset import Dataset, Source

# in the run's student/: mean and logvar, each (N, Z), of the posterior of N training samples
ENCODINGS = "encodings.safetensors"


@dataclass(frozen=True)
class Codes(Source):
    """Codes z (Z,) of the training samples of `recipe` (objective variance_guided): `draws` of each posterior, by
    `seed`.

    held_out: the share of samples that is not trained on. overrides: key=value for the recipe. root: the run's
    student/, where the recipe does not determine it.
    """

    recipe: str = ""
    overrides: tuple[str, ...] = ()
    draws: Annotated[int, Range(1, 1000)] = 4
    held_out: BelowOne = 0.1
    seed: Seed = 0
    root: str = ""
    in_pixels: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not (self.recipe or self.root):
            raise ValueError("recipe: is required: the recipe that trains the encoder")

    def build(self) -> Dataset:
        z = draws_of(Path(self.root), self.draws, self.seed)
        kept = z.shape[0] - round(self.held_out * z.shape[0])
        return Dataset("codes", z[:kept].flatten(0, 1), z[kept:].flatten(0, 1))


def draws_of(folder: Path, draws: int, seed: int, most: int | None = None) -> Tensor:
    """(N, draws, Z) float32: codes of at most `most` samples, in an order drawn by the seed. Raises ValueError without
    codes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(folder / ENCODINGS)
        mean, std = kept["mean"], (kept["logvar"] / 2).exp()
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(
            f"{folder / ENCODINGS}: is missing or not whole; the recipe that trains the encoder makes it"
        ) from error
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(mean), generator=generator)[:most]
    noise = torch.randn(len(order), draws, mean.shape[1], generator=generator)
    return mean[order].unsqueeze(1) + std[order].unsqueeze(1) * noise
