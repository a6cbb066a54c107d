"""Mean and covariance of the features of a set of real pictures, in a file: the reference of a Frechet distance.

The file is an .npz with the keys of EDM's and ADM's: `mu` (D,) and `sigma` (D, D), the covariance with n - 1 in the
denominator. `flowmap reference` writes them in float64, with the number of pictures, the feature space and the identity
of the data. Other keys are ignored. Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from flowmap.base.files import write_beside

MEAN, COVARIANCE = "mu", "sigma"
COUNT, FEATURES, IDENTITY = "count", "features", "identity"  # in files that `flowmap reference` writes
MAX_WIDTH = 16_384
SYMMETRY = 1e-3  # largest asymmetry of sigma, relative to its largest entry: some files have it in float32


@dataclass(frozen=True, eq=False)
class Statistics:
    """mean (D,) and covariance (D, D) of features, float64. None: the file has no such entry."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    features: str | None = None
    identity: str | None = None

    @property
    def width(self) -> int:
        return len(self.mean)

    def write(self, path: Path) -> None:
        """Write the .npz atomically."""
        arrays: dict[str, Any] = {MEAN: self.mean.cpu().numpy(), COVARIANCE: self.covariance.cpu().numpy()}
        arrays |= {
            key: numpy.asarray(value)
            for key, value in ((COUNT, self.count), (FEATURES, self.features), (IDENTITY, self.identity))
            if value is not None
        }

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # savez would add a suffix to a name
                numpy.savez(file, **arrays)

        write_beside(path, write)


class Moments:
    """Running sums of features (B, D) in float64: their number, their sum and the sum of their outer products."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        x = features.to(self.sum)
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of samples."""
        found = Moments(len(self.sum), self.sum.device)
        found.count, found.sum = self.count + other.count, self.sum + other.sum
        found.outer = self.outer + other.outer
        return found

    def statistics(self, **more: Any) -> Statistics:
        """Mean and covariance. Raises ValueError for fewer than two samples, or for features that are not finite."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 or more pictures, got {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * mean.outer(mean)) / (self.count - 1)
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("the features of some pictures are not finite")
        return Statistics(mean, covariance, count=self.count, **more)


def read_statistics(path: str | Path) -> Statistics:
    """The statistics in an .npz. Anything else raises a one-line ValueError that names the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        pickled = "; a pickle, such as EDM2's .pkl, is not read: " if Path(path).suffix == ".pkl" else ": "
        raise ValueError(f"{path}: is no .npz{pickled}save mu and sigma with numpy.savez")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            return _checked(Path(path), {key: file[key] for key in _KEYS if key in file.files})
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith(str(path)) else f"{path}: cannot be read: {text[:200]}") from error


_KEYS = (MEAN, COVARIANCE, COUNT, FEATURES, IDENTITY)


def _checked(path: Path, arrays: dict[str, Any]) -> Statistics:
    missing = [key for key in (MEAN, COVARIANCE) if key not in arrays]
    if missing:
        raise ValueError(f"{path}: has no {' and no '.join(missing)}; a reference has mu (D,) and sigma (D, D)")
    mean, covariance = arrays[MEAN], arrays[COVARIANCE]
    shapes = f"mu is {mean.shape} {mean.dtype}, sigma {covariance.shape} {covariance.dtype}"
    width = mean.size
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{path}: {shapes}; allowed: floating-point numbers")
    if mean.shape != (width,) or covariance.shape != (width, width) or not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{path}: {shapes}; allowed: (D,) and (D, D), D at most {MAX_WIDTH}")
    mean, covariance = (torch.from_numpy(value.astype(numpy.float64)) for value in (mean, covariance))
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: has values that are not finite")
    if (covariance - covariance.T).abs().max() > SYMMETRY * covariance.abs().max() or covariance.diag().min() < 0:
        raise ValueError(f"{path}: sigma is no covariance: it is not symmetric, or has a variance below 0")
    count = int(arrays[COUNT]) if COUNT in arrays else None
    texts = {key: str(arrays[key]) for key in (FEATURES, IDENTITY) if key in arrays}
    return Statistics(mean, (covariance + covariance.T) / 2, count, texts.get(FEATURES), texts.get(IDENTITY))
